"""What was measured for the updates of a run: `signals.bin`, blocks that lines of `mixing.jsonl` point to.

A block is an `.npz` archive: `numpy.load` reads its bytes. It is written before the line that points to it:
a kill leaves at most a block without a line, which the next start of the run cuts off.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.errors import InputError
from megatron_dynmix.files import sha256
from megatron_dynmix.records.jsonl import RecordFile
from megatron_dynmix.records.schema import Block, MixingUpdate

SIGNALS = "signals.bin"
logger = logging.getLogger(__name__)


class SignalWriter(RecordFile):
    """Appends the arrays of updates to a file, behind those of `kept`; what lies after them is cut off."""

    def __init__(self, path: Path, kept: Sequence[MixingUpdate]) -> None:
        path.touch()
        super().__init__(path, "r+b")
        end = max((update.block.offset + update.block.size for update in kept if update.block), default=0)
        if path.stat().st_size < end:
            logger.warning("%s is shorter than mixing.jsonl says: signals of updates are lost", path)
        self._file.truncate(end)
        self._file.seek(end)

    def append(self, arrays: Mapping[str, NDArray[Any]]) -> Block:
        """Write a block, and tell where it is."""
        data = packed(arrays)
        block = Block(offset=self._file.tell(), size=len(data), digest=sha256(data))
        self.add(data)
        return block


def packed(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return arrays as one block; counts take as many bytes each as the largest of them needs."""
    file, narrow = io.BytesIO(), dict[str, Any](arrays)
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.integer) and array.size and array.min() >= 0:
            narrow[name] = array.astype(np.min_scalar_type(array.max()))
    np.savez(file, **narrow)
    return file.getvalue()


def unpacked(data: bytes) -> dict[str, NDArray[Any]]:
    """Return the arrays of a block, integers as int64."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return {
        name: array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array
        for name, array in arrays.items()
    }


def with_signal(update: MixingUpdate, path: Path) -> MixingUpdate:
    """Return an update with the arrays that its line points to; `InputError` if they are not as written."""
    block = update.block
    if block is None:
        return update
    try:
        with path.open("rb") as file:
            file.seek(block.offset)
            data = file.read(block.size)
        if sha256(data) != block.digest:
            raise ValueError(f"the {block.size} bytes from {block.offset} on are not those that were written")
        return update.with_arrays(unpacked(data))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path.name}: the signal of iteration {update.iteration} is lost: {why}") from None
