"""The tensors of one world, read as if they were those of the other; held is only what was asked for."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from operator import sub
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.convert.weight_map import Side, WeightMap
from megatron_dynmix.errors import InputError
from megatron_dynmix.families.names import Shape

T = TypeVar("T")
BOX_BYTES = 16 << 20
"""Small enough that a tensor-parallel rank which wants a slice reads little beside it, and for `malloc` to
give the same memory again and again; large enough that what surrounds the numbers does not count."""


class Cast:
    """Tensors whose numbers are of another type than they are held in; those of `float32` are that."""

    def __init__(self, held: Tensors, dtype: torch.dtype, float32: Container[str] = ()) -> None:
        self._held, self.shapes = held, held.shapes
        self.dtypes: Mapping[str, torch.dtype] = {
            name: torch.float32 if name in float32 else dtype for name in held.shapes
        }

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box, and cast it; refuse a number for which the type has no room."""
        held = self._held.read(name, offset, shape)
        cast = held.to(self.dtypes[name])
        largest = torch.finfo(cast.dtype).max
        if largest < torch.finfo(held.dtype).max and (lost := cast.isinf() & held.isfinite()).any():
            raise InputError(
                f"{name} holds {held[lost][0].item():g}, and {type_name(cast.dtype)} ends at {largest:g}, so "
                "that it would be infinite; give another --dtype"
            )
        return cast


class Seen:
    """Tensors of one side of a map, each box of them assembled from blocks of the side that is held."""

    def __init__(self, held: Tensors, wanted: Side, holding: Side) -> None:
        self._held, self._wanted, self._holding = held, wanted, holding
        self.shapes = wanted.shapes
        # all held tensors that have a part in a wanted one are of one type
        first = {name: next(iter(places.values()))[0] for name, places in wanted.index.items()}
        self.dtypes = {name: held.dtypes[holding.place(first[name])[0]] for name in wanted.shapes}

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Assemble a box of a tensor; rows that pad the vocabulary are zeros.

        A box inside one block is what was read, without a copy.
        """
        dtype = self.dtypes[name]
        real = self._wanted.padded.get(name)
        padded = real is not None and offset[0] + shape[0] > real
        result = torch.zeros(shape, dtype=dtype) if padded else None
        for part in self._wanted.parts_in(name, offset, shape):
            _, start, size = self._wanted.box_of(part)
            tensor = self._held.read(*self._holding.box_of(part))
            tensor = (tensor.mT.contiguous() if part.block.transposed else tensor).reshape(size)
            if size == shape:
                return tensor.to(dtype)
            result = torch.empty(shape, dtype=dtype) if result is None else result
            result[box(tuple(map(sub, start, offset)), size)] = tensor
        assert result is not None, "blocks and padding fill a tensor"
        return result


def as_megatron(hugging_face: Tensors, weight_map: WeightMap) -> Seen:
    """Return tensors of a Hugging Face model, seen as those of a Megatron checkpoint."""
    return Seen(hugging_face, weight_map.megatron, weight_map.hf)


def as_hugging_face(megatron: Tensors, weight_map: WeightMap) -> Seen:
    """Return tensors of a Megatron checkpoint, seen as those of a Hugging Face model."""
    return Seen(megatron, weight_map.hf, weight_map.megatron)


class Named:
    """Some of the tensors that are held, each by a name of its own."""

    def __init__(self, held: Tensors, names: Mapping[str, str]) -> None:
        """Take `names`, name -> what it is held as."""
        self._held, self._names = held, names
        self.shapes = {name: held.shapes[there] for name, there in names.items()}
        self.dtypes = {name: held.dtypes[there] for name, there in names.items()}

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of a tensor."""
        return self._held.read(self._names[name], offset, shape)


class Together:
    """The tensors of two that have no name in common."""

    def __init__(self, one: Tensors, other: Tensors) -> None:
        self._one, self._other = one, other
        self.shapes = {**one.shapes, **other.shapes}
        self.dtypes = {**one.dtypes, **other.dtypes}

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of a tensor."""
        holds = self._one if name in self._one.shapes else self._other
        return holds.read(name, offset, shape)


class Box(NamedTuple):
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
    if not math.prod(shape) or not shape:  # of what is kept aside some are empty, or one number
        yield from [Box(name, (), (), itemsize)] if not shape else []
        return
    leading, rows = shape[:-2], shape[-2:-1] or shape
    last = shape[-1:] if len(shape) > 1 else ()
    row_bytes = itemsize * math.prod(last)
    step = max(1, BOX_BYTES // row_bytes)
    for place in itertools.product(*map(range, leading)):
        for first in range(0, rows[0], step):
            count = min(step, rows[0] - first)
            box_shape = (*(1 for _ in place), count, *last)
            yield Box(name, (*place, first, *(0 for _ in last)), box_shape, count * row_bytes)


def grouped(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> list[list[T]]:
    """Put items together in their order, as many as have at most `limit` bytes; a larger one is alone."""
    groups: list[list[T]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + nbytes(item) > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += nbytes(item)
    return groups


def box(offset: Shape, shape: Shape) -> tuple[slice, ...]:
    """Return the index of a box in a tensor."""
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def read_bytes(tensors: Tensors, part: Box) -> np.ndarray:
    """Read a box as its bytes, in C order."""
    return as_bytes(tensors.read(part.name, part.offset, part.shape))


def as_bytes(numbers: torch.Tensor) -> np.ndarray:
    """Return the bytes of numbers, in C order."""
    return numbers.contiguous().flatten().view(torch.uint8).numpy()


def size_of(tensors: Tensors, name: str) -> int:
    """Bytes of a tensor."""
    return math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize


def total_size(tensors: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(size_of(tensors, name) for name in tensors.shapes)


def main_type(tensors: Tensors) -> str:
    """Type of most of the numbers, by its name in torch."""
    sizes = Counter[torch.dtype]()
    for name in tensors.shapes:
        sizes[tensors.dtypes[name]] += size_of(tensors, name)
    return type_name(sizes.most_common(1)[0][0])


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a type in torch."""
    return str(dtype).removeprefix("torch.")
