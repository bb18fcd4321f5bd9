"""Which numbers of a Hugging Face model are which numbers of a Megatron checkpoint: boxes that both hold.

Every tensor of either world is laid out with boxes that are copied as they are, so one description serves
both directions and any slice. Axes: L layers, E experts, H hidden, F the experts' inner width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import add, lt, sub
from typing import NamedTuple

from megatron_dynmix.families.names import Shape, swapped


@dataclass(frozen=True, slots=True)
class Block:
    """A box of numbers that a Hugging Face tensor and a Megatron tensor both hold.

    `shape` is its size in the last axes of either tensor; in the axes before (fused experts `[E, 2F, H]`,
    stacked layers `[L, ...]`) its size is 1. In the Hugging Face tensor the last two axes are the other way
    round if it is `transposed`.
    """

    hf: str
    hf_offset: Shape
    megatron: str
    megatron_offset: Shape
    shape: Shape
    transposed: bool = False


class Part(NamedTuple):
    """A box within a block, in the axes of its `shape`."""

    block: Block
    offset: Shape
    shape: Shape


class Side:
    """One of the two worlds as a map sees it: its tensors, and which blocks each is made of."""

    def __init__(
        self, shapes: Mapping[str, Shape], blocks: Iterable[Block], *, is_hf: bool, padded: Mapping[str, int]
    ) -> None:
        self.shapes = shapes
        """Name -> shape, padding included."""
        self.padded = padded
        """Name -> rows that hold something; those after them are padding, in no block, and read as zeros."""
        self.is_hf = is_hf
        self.index: dict[str, dict[Shape, list[Block]]] = {}
        """Name -> (leading axes of a block -> the blocks there)."""
        for block in blocks:
            name, start = self.place(block)
            leading = start[: len(start) - len(block.shape)]
            self.index.setdefault(name, {}).setdefault(leading, []).append(block)

    def place(self, block: Block) -> tuple[str, Shape]:
        """Return the tensor of this side that holds the block, and where in it the block begins."""
        return (block.hf, block.hf_offset) if self.is_hf else (block.megatron, block.megatron_offset)

    def turned(self, block: Block, axes: Shape) -> Shape:
        """Return axes of a block in the order of this side's tensor, or back again."""
        return swapped(axes) if self.is_hf and block.transposed else axes

    def leading(self, name: str) -> int:
        """Return how many of a tensor's first axes only number its blocks; 0 for most."""
        return len(next(iter(self.index[name])))

    def parts_in(self, name: str, offset: Shape, shape: Shape) -> Iterator[Part]:
        """Yield the parts of blocks in a box of a tensor, without looking at the blocks of other layers."""
        count = self.leading(name)
        ranges = (
            range(start, start + size) for start, size in zip(offset[:count], shape[:count], strict=True)
        )
        for place in itertools.product(*ranges):
            for block in self.index[name].get(place, ()):
                start = self.place(block)[1][count:]
                size = self.turned(block, block.shape)
                low, high = _common(start, size, offset[count:], shape[count:])
                if all(map(lt, low, high)):
                    inside, part = tuple(map(sub, low, start)), tuple(map(sub, high, low))
                    yield Part(block, self.turned(block, inside), self.turned(block, part))

    def box_of(self, part: Part) -> tuple[str, Shape, Shape]:
        """Return the tensor of this side that holds a part of a block, and the box that it is there."""
        name, start = self.place(part.block)
        leading = len(start) - len(part.shape)
        inside, size = (self.turned(part.block, axes) for axes in (part.offset, part.shape))
        return name, (*start[:leading], *map(add, start[leading:], inside)), (1,) * leading + size

    def assert_covered(self) -> None:
        """See that blocks fill each tensor, without overlap: a number left out would be random later."""
        assert self.index.keys() == self.shapes.keys(), (
            f"blocks and shapes: {self.index.keys() ^ self.shapes.keys()}"
        )
        for name, places in self.index.items():
            shape = (self.padded.get(name, self.shapes[name][0]), *self.shapes[name][1:])
            count = self.leading(name)
            every = set(itertools.product(*map(range, shape[:count])))
            assert places.keys() == every, f"{name} {shape}: no block at {sorted(every ^ places.keys())[:3]}"
            for blocks in places.values():
                boxes = [(self.place(block)[1][count:], self.turned(block, block.shape)) for block in blocks]
                _assert_filled(name, shape[count:], boxes)


def _common(offset: Shape, shape: Shape, other_offset: Shape, other_shape: Shape) -> tuple[Shape, Shape]:
    """Return where what two boxes have in common begins and ends; not after it begins if that is nothing."""
    ends = map(min, map(add, offset, shape), map(add, other_offset, other_shape))
    return tuple(map(max, offset, other_offset)), tuple(ends)


def _assert_filled(name: str, shape: Shape, boxes: list[tuple[Shape, Shape]]) -> None:
    for offset, size in boxes:
        inside = all(o >= 0 and o + s <= n for o, s, n in zip(offset, size, shape, strict=True))
        assert inside, f"{name} {shape}: block {size} at {offset} sticks out"
    volume = sum(math.prod(size) for _, size in boxes)
    assert volume == math.prod(shape), f"{name} {shape}: its blocks hold {volume} numbers"
    for one, other in itertools.combinations(boxes, 2):
        meet = all(map(lt, *_common(*one, *other)))
        assert not meet, f"{name} {shape}: blocks at {one[0]} and {other[0]} overlap"


@dataclass(frozen=True)
class WeightMap:
    """The tensors of one model in both worlds, and the blocks that tie them; every number is in one block."""

    hf_shapes: Mapping[str, Shape]
    megatron_shapes: Mapping[str, Shape]
    blocks: tuple[Block, ...]
    groups: Mapping[str, str]
    """Megatron tensor -> its kind for a verdict: attention, router, experts, norms, embedding, ..."""
    padded: Mapping[str, int] = field(default_factory=dict)
    """Megatron tensor -> its rows that hold something; those after them pad the vocabulary."""
    float32: frozenset[str] = frozenset()
    """Tensors of either world that are float32 whatever type the model is in."""

    def __post_init__(self) -> None:
        self.hf.assert_covered()
        self.megatron.assert_covered()
        assert self.groups.keys() == self.megatron_shapes.keys(), "every tensor has one group"

    @cached_property
    def hf(self) -> Side:
        """The Hugging Face tensors."""
        return Side(self.hf_shapes, self.blocks, is_hf=True, padded={})

    @cached_property
    def megatron(self) -> Side:
        """The Megatron tensors."""
        return Side(self.megatron_shapes, self.blocks, is_hf=False, padded=self.padded)

    def group_of(self, name: str) -> str:
        """Return the kind of a Hugging Face tensor."""
        return self.groups[next(iter(self.hf.index[name].values()))[0].megatron]

    @property
    def parameters(self) -> int:
        """Numbers of the model, padding left out."""
        return sum(math.prod(shape) for shape in self.hf_shapes.values())
