"""The tensors of one world, read as if they were those of the other; held is only what was asked for."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.convert.weight_map import Block, Shape, Side, WeightMap

BOX_BYTES = 16 << 20
"""Small enough that a tensor-parallel rank which wants a slice reads little beside it, and for `malloc` to
give the same memory again and again; large enough that what surrounds the numbers does not count."""


class InMemory:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box as a view."""
        return self.tensors[name][box(offset, shape)]


class Cast:
    """Tensors whose numbers are of another type than they are held in."""

    def __init__(self, held: Tensors, dtype: torch.dtype) -> None:
        self._held = held
        self.shapes = held.shapes
        self.dtypes: Mapping[str, torch.dtype] = dict.fromkeys(held.shapes, dtype)

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box, and cast it."""
        return self._held.read(name, offset, shape).to(self.dtypes[name])


class _Seen:
    """Tensors of one side of a map, each box of them assembled from blocks of the side that is held."""

    def __init__(self, held: Tensors, wanted: Side, holding: Side) -> None:
        self._held = held
        self._wanted = wanted
        self._holding = holding
        self.shapes = wanted.shapes
        # all held tensors that have a part in a wanted one are of one type
        first = {name: next(iter(places.values()))[0] for name, places in wanted.index.items()}
        self.dtypes = {name: held.dtypes[holding.place(first[name])[0]] for name in wanted.shapes}

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Assemble a box of a tensor; rows that pad the vocabulary are zeros.

        A box inside one block is what was read, without a copy.
        """
        dtype = self.dtypes[name]
        blocks = list(self._wanted.blocks_in(name, offset, shape))
        if len(blocks) == 1:
            place, part, tensor = self._read_block(blocks[0], offset, shape)
            if part == shape:
                return tensor.to(dtype)
        real = self._wanted.padded.get(name)
        padded = real is not None and offset[0] + shape[0] > real
        result = torch.zeros(shape, dtype=dtype) if padded else torch.empty(shape, dtype=dtype)
        for block in blocks:
            place, part, tensor = self._read_block(block, offset, shape)
            result[box(place, part)] = tensor
        return result

    def _read_block(self, block: Block, offset: Shape, shape: Shape) -> tuple[Shape, Shape, torch.Tensor]:
        """Return where in a box the block's part of it begins, the size of that part, and its numbers."""
        _, start = self._wanted.place(block)
        size = (1,) * (len(start) - len(block.shape)) + block.shape
        low = tuple(map(max, start, offset))
        high = tuple(min(s + n, o + m) for s, n, o, m in zip(start, size, offset, shape, strict=True))
        part = tuple(h - a for h, a in zip(high, low, strict=True))
        source, source_start = self._holding.place(block)
        inner = len(block.shape)
        shift = tuple(a - s for a, s in zip(low, start, strict=True))[len(start) - inner :]
        leading = len(source_start) - inner
        source_offset = (*source_start[:leading], *map(sum, zip(source_start[leading:], shift, strict=True)))
        source_shape = (1,) * leading + part[len(part) - inner :]
        tensor = self._held.read(source, source_offset, source_shape).reshape(part)
        return tuple(a - o for a, o in zip(low, offset, strict=True)), part, tensor


class AsMegatron(_Seen):
    """Tensors of a Hugging Face model, seen as those of a Megatron checkpoint."""

    def __init__(self, hugging_face: Tensors, weight_map: WeightMap) -> None:
        super().__init__(hugging_face, weight_map.megatron, weight_map.hf)


class AsHuggingFace(_Seen):
    """Tensors of a Megatron checkpoint, seen as those of a Hugging Face model."""

    def __init__(self, megatron: Tensors, weight_map: WeightMap) -> None:
        super().__init__(megatron, weight_map.hf, weight_map.megatron)


@dataclass(frozen=True)
class Box:
    """A box of a tensor."""

    name: str
    offset: Shape
    shape: Shape
    nbytes: int


def boxes_of(tensors: Tensors, name: str) -> Iterator[Box]:
    """Cut a tensor into boxes of at most `BOX_BYTES`, in the order of its numbers; a row is never cut.

    All axes but the last two are taken one by one, the last but one in runs of rows.
    """
    shape, itemsize = tensors.shapes[name], tensors.dtypes[name].itemsize
    leading, rows = shape[:-2], shape[-2:-1] or shape
    last = shape[-1:] if len(shape) > 1 else ()
    row_bytes = itemsize * math.prod(last)
    step = max(1, BOX_BYTES // row_bytes)
    for place in itertools.product(*map(range, leading)):
        for first in range(0, rows[0], step):
            count = min(step, rows[0] - first)
            box_shape = (*(1 for _ in place), count, *last)
            yield Box(name, (*place, first, *(0 for _ in last)), box_shape, count * row_bytes)


def box(offset: Shape, shape: Shape) -> tuple[slice, ...]:
    """Return the index of a box in a tensor."""
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def read_bytes(tensors: Tensors, part: Box) -> np.ndarray:
    """Read a box as its bytes, in C order."""
    numbers = tensors.read(part.name, part.offset, part.shape).contiguous()
    return numbers.flatten().view(torch.uint8).numpy()


def size_of(tensors: Tensors, name: str) -> int:
    """Bytes of a tensor."""
    return math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize


def total_size(tensors: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(size_of(tensors, name) for name in tensors.shapes)


def main_type(tensors: Tensors) -> str:
    """Type of most of the numbers, by its name in torch."""
    sizes: Counter[torch.dtype] = Counter()
    for name in tensors.shapes:
        sizes[tensors.dtypes[name]] += size_of(tensors, name)
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")
