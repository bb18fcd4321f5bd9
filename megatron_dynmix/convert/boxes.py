"""Tensors cut into boxes small enough to be read and written one at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_dynmix.convert.blocks import Shape
from megatron_dynmix.convert.tensors import Tensors

BOX_BYTES = 16 << 20
"""Small enough that a tensor-parallel rank which wants a slice reads little beside it, and for `malloc` to
give the same memory again and again; large enough that what surrounds the numbers does not count."""


@dataclass(frozen=True)
class Box:
    """A box of a tensor."""

    name: str
    offset: Shape
    shape: Shape
    nbytes: int


def boxes_of(name: str, shape: Shape, itemsize: int) -> Iterator[Box]:
    """Cut a tensor into boxes of at most `BOX_BYTES`, in the order of its numbers; a row is never cut.

    All axes but the last two are taken one by one, the last but one in runs of rows.
    """
    leading, rows = shape[:-2], shape[-2:-1] or shape
    last = shape[-1:] if len(shape) > 1 else ()
    row_bytes = itemsize * math.prod(last)
    step = max(1, BOX_BYTES // row_bytes)
    for place in itertools.product(*map(range, leading)):
        for first in range(0, rows[0], step):
            count = min(step, rows[0] - first)
            box_shape = (*(1 for _ in place), count, *last)
            yield Box(name, (*place, first, *(0 for _ in last)), box_shape, count * row_bytes)


class Cast:
    """Tensors whose numbers are of another type than they are held in."""

    def __init__(self, held: Tensors, dtype: torch.dtype) -> None:
        self._held = held
        self.shapes = held.shapes
        self.dtypes: Mapping[str, torch.dtype] = dict.fromkeys(held.shapes, dtype)

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box, and cast it."""
        return self._held.read(name, offset, shape).to(self.dtypes[name])


def size_of(tensors: Tensors, name: str) -> int:
    """Bytes of a tensor."""
    return math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize
