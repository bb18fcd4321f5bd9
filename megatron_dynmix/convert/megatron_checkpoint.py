"""The weights in a Megatron checkpoint (`torch_dist`), read box by box whatever layout wrote them.

Such a folder holds each tensor in chunks; a chunk is a small archive of `torch.save` inside a file. Of a
chunk only the bytes from a box's first number to its last are read. Axes: C chunks, N axes of the tensor.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_dynmix.convert.tensors import box
from megatron_dynmix.errors import InputError
from megatron_dynmix.families.names import Shape

OPTIMIZER = "optimizer."
"""What the names of the optimizer's tensors begin with."""


class MegatronCheckpoint:
    """The model's tensors in one `iter_*` folder; those of the optimizer are not seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = _read_metadata(folder)
        tensors = {
            name: item
            for name, item in metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata) and not name.startswith(OPTIMIZER)
        }
        self.shapes: Mapping[str, Shape] = {name: tuple(item.size) for name, item in tensors.items()}
        self.dtypes: Mapping[str, torch.dtype] = {
            name: item.properties.dtype for name, item in tensors.items()
        }
        self._places: Mapping[MetadataIndex, Any] = metadata.storage_data
        self._outlines: dict[MetadataIndex, _Outline] = {}
        self._boxes = {
            name: tuple(
                np.array([getattr(chunk, part) for chunk in item.chunks]).reshape(len(item.chunks), -1)
                for part in ("offsets", "sizes")
            )
            for name, item in tensors.items()
        }

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of a tensor; refuse a checkpoint that does not hold all of it."""
        starts_CN, sizes_CN = self._boxes[name]
        low_CN = np.maximum(starts_CN, offset)
        high_CN = np.minimum(starts_CN + sizes_CN, np.add(offset, shape))
        meeting_C = np.flatnonzero((low_CN < high_CN).all(axis=1))
        if int((high_CN - low_CN)[meeting_C].prod(axis=1).sum()) != math.prod(shape):
            raise InputError(f"{self.folder}: {name} is not whole; take another checkpoint")
        whole: torch.Tensor | None = None
        for chunk in meeting_C.tolist():
            start, low, high = (array[chunk] for array in (starts_CN, low_CN, high_CN))
            part = self._read_chunk(
                MetadataIndex(name, start.tolist()),
                tuple(sizes_CN[chunk].tolist()),
                tuple((low - start).tolist()),
                tuple((high - low).tolist()),
            )
            if len(meeting_C) == 1:
                return part
            whole = torch.empty(shape, dtype=part.dtype) if whole is None else whole
            whole[box(tuple((low - offset).tolist()), tuple(part.shape))] = part
        assert whole is not None, "a box that is filled has met a chunk"
        return whole

    def _read_chunk(self, index: MetadataIndex, size: Shape, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of one chunk."""
        path = self.folder / self._places[index].relative_path
        try:
            with path.open("rb", buffering=0) as file:
                if index not in self._outlines:
                    self._outlines[index] = _outline(file, self._places[index])
                outline = self._outlines[index]
                if outline.shape != size:
                    raise ValueError(f"{index.fqn} is {outline.shape} there, not {size}")
                first = sum(o * s for o, s in zip(offset, outline.strides, strict=True))
                span = 1 + sum((n - 1) * s for n, s in zip(shape, outline.strides, strict=True))
                numbers = torch.empty(span, dtype=outline.dtype)
                file.seek(outline.begin + outline.dtype.itemsize * first)
                _fill(file, numbers)
        except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(f"{path} cannot be read ({error}); take another checkpoint") from None
        return numbers.as_strided(shape, outline.strides)


class _Outline(NamedTuple):
    """A chunk without its numbers."""

    shape: Shape
    strides: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    """Where in its file its first number is, in bytes."""


def _read_metadata(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except FileNotFoundError:
        raise InputError(f"{folder} is not a Megatron checkpoint: there is no .metadata in it") from None
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{folder / '.metadata'} cannot be read ({error}); take another checkpoint"
        ) from None


def _outline(file: io.FileIO, place: Any) -> _Outline:
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"it is compressed ({', '.join(place.transform_descriptors)})")
    archive: Any = _create_file_view(file, place.offset, place.length)
    tensor = torch.load(archive, map_location="meta", weights_only=True)  # numbers stay on the disk
    begin = tensor.untyped_storage()._checkpoint_offset + tensor.itemsize * tensor.storage_offset()
    return _Outline(tuple(tensor.shape), tensor.stride(), tensor.dtype, place.offset + begin)


def _fill(file: io.FileIO, numbers: torch.Tensor) -> None:
    """Read a tensor's bytes from where the file stands."""
    view = memoryview(numbers.view(torch.uint8).numpy())
    while len(view):
        count = os.readv(file.fileno(), [view])
        if not count:
            raise EOFError("it ends too early")
        view = view[count:]
