"""Which numbers of a Hugging Face model are which numbers of a Megatron checkpoint: boxes that both hold.

Every tensor of either world is laid out with boxes that are copied as they are, so one description serves
both directions and any slice. Axes: L layers, E experts, H hidden, F the experts' inner width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]
Index = dict[str, dict[Shape, list["Block"]]]


@dataclass(frozen=True, slots=True)
class Block:
    """A box of numbers that a Hugging Face tensor and a Megatron tensor both hold.

    `shape` is its size in the last axes of either tensor; in the axes before (fused experts `[E, 2F, H]`,
    stacked layers `[L, ...]`) its size is 1.
    """

    hf: str
    hf_offset: Shape
    megatron: str
    megatron_offset: Shape
    shape: Shape

    @property
    def hf_shape(self) -> Shape:
        """Size of the box in the Hugging Face tensor, all axes."""
        return (1,) * (len(self.hf_offset) - len(self.shape)) + self.shape

    @property
    def megatron_shape(self) -> Shape:
        """Size of the box in the Megatron tensor, all axes."""
        return (1,) * (len(self.megatron_offset) - len(self.shape)) + self.shape


@dataclass(frozen=True)
class Side:
    """One of the two worlds as a map sees it: its tensors, and which blocks each is made of."""

    shapes: Mapping[str, Shape]
    """Name -> shape, padding included."""
    padded: Mapping[str, int]
    """Name -> rows that hold something; the rows after them are padding, in no block, and read as zeros."""
    index: Index
    """Name -> (leading axes of a block -> the blocks there)."""
    is_hf: bool

    def place(self, block: Block) -> tuple[str, Shape]:
        """Tensor of this side that holds the block, and where in it the block begins."""
        return (block.hf, block.hf_offset) if self.is_hf else (block.megatron, block.megatron_offset)

    def leading(self, name: str) -> int:
        """How many of a tensor's first axes only number its blocks; 0 for most."""
        return len(next(iter(self.index[name])))

    def blocks_in(self, name: str, offset: Shape, shape: Shape) -> Iterator[Block]:
        """Blocks that have a part in a box of a tensor, without looking at those of other layers."""
        count = self.leading(name)
        ranges = [
            range(start, start + size) for start, size in zip(offset[:count], shape[:count], strict=True)
        ]
        for place in itertools.product(*ranges):
            for block in self.index[name].get(place, ()):
                starts = self.place(block)[1][count:]
                if all(
                    begin < start + size and start < begin + length
                    for begin, length, start, size in zip(
                        starts, block.shape, offset[count:], shape[count:], strict=True
                    )
                ):
                    yield block


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
    hf: Side = field(init=False, repr=False, compare=False)
    megatron: Side = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        hf, megatron = _index(self.blocks)
        object.__setattr__(self, "hf", Side(self.hf_shapes, {}, hf, is_hf=True))
        object.__setattr__(self, "megatron", Side(self.megatron_shapes, self.padded, megatron, is_hf=False))
        _assert_covered(self.hf)
        _assert_covered(self.megatron)
        assert self.groups.keys() == self.megatron_shapes.keys(), "every tensor has one group"

    def group_of(self, name: str) -> str:
        """Kind of a tensor of either world."""
        if name in self.groups:
            return self.groups[name]
        blocks = next(iter(self.hf.index[name].values()))
        return self.groups[blocks[0].megatron]

    @property
    def parameters(self) -> int:
        """Numbers of the model, padding left out."""
        return sum(math.prod(shape) for shape in self.hf_shapes.values())


def _index(blocks: tuple[Block, ...]) -> tuple[Index, Index]:
    hf: Index = {}
    megatron: Index = {}
    for block in blocks:
        for index, name, offset in (
            (hf, block.hf, block.hf_offset),
            (megatron, block.megatron, block.megatron_offset),
        ):
            leading = offset[: len(offset) - len(block.shape)]
            index.setdefault(name, {}).setdefault(leading, []).append(block)
    return hf, megatron


def _assert_covered(side: Side) -> None:
    """That the blocks of each tensor fill it, without overlap: a number left out would be random later."""
    assert side.index.keys() == side.shapes.keys(), (
        f"blocks and shapes: {side.index.keys() ^ side.shapes.keys()}"
    )
    for name, places in side.index.items():
        shape = (side.padded.get(name, side.shapes[name][0]), *side.shapes[name][1:])
        count = side.leading(name)
        every = set(itertools.product(*(range(size) for size in shape[:count])))
        assert places.keys() == every, f"{name} {shape}: no block at {sorted(every ^ places.keys())[:3]}"
        for blocks in places.values():
            _assert_filled(name, shape[count:], [(side.place(b)[1][count:], b.shape) for b in blocks])


def _assert_filled(name: str, shape: Shape, boxes: list[tuple[Shape, Shape]]) -> None:
    for offset, size in boxes:
        inside = all(o >= 0 and o + s <= n for o, s, n in zip(offset, size, shape, strict=True))
        assert inside, f"{name} {shape}: block {size} at {offset} sticks out"
    volume = sum(math.prod(size) for _, size in boxes)
    assert volume == math.prod(shape), f"{name} {shape}: its blocks hold {volume} numbers"
    for (a, a_size), (b, b_size) in itertools.combinations(boxes, 2):
        apart = any(i + m <= j or j + n <= i for i, m, j, n in zip(a, a_size, b, b_size, strict=True))
        assert apart, f"{name} {shape}: blocks at {a} and {b} overlap"
