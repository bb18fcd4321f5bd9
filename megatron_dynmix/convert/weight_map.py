"""Which numbers of a Hugging Face model are which numbers of a Megatron checkpoint: boxes that both hold.

Every tensor of either world is laid out with boxes that are copied as they are, so one description serves
both directions and any slice. Rules name the tensors of a layer; `lay_out` makes a model's blocks of them.
Axes: L layers, E experts, H hidden, F the experts' inner width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from operator import add, lt, sub
from typing import Any, NamedTuple

Shape = tuple[int, ...]


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
                low, high = _common(start, block.shape, offset[count:], shape[count:])
                if all(map(lt, low, high)):
                    yield Part(block, tuple(map(sub, low, start)), tuple(map(sub, high, low)))

    def box_of(self, part: Part) -> tuple[str, Shape, Shape]:
        """Return the tensor of this side that holds a part of a block, and the box that it is there."""
        name, start = self.place(part.block)
        leading = len(start) - len(part.shape)
        offset = (*start[:leading], *map(add, start[leading:], part.offset))
        return name, offset, (1,) * leading + part.shape

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
                boxes = [(self.place(block)[1][count:], block.shape) for block in blocks]
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


Sizes = Mapping[str, int]

EMBEDDING = "embedding.word_embeddings.weight"
VOCABULARY = (EMBEDDING, "output_layer.weight")
"""Megatron tensors with a row for each token."""


class Piece(NamedTuple):
    """A block within one layer, and one expert if the rule is for each of them."""

    hf: str
    hf_shape: Shape
    hf_offset: Shape
    megatron_offset: Shape
    shape: Shape


@dataclass(frozen=True)
class Rule:
    """Hugging Face tensors of equal shape that lie under one another in a Megatron tensor; one may be alone.

    `{e}` in a name stands for the number of an expert: the rule then holds for each of them.
    """

    hf: str | tuple[str, ...]
    megatron: str
    axes: str
    """Axes of each Hugging Face tensor as letters of `sizes_of`, such as `I H`."""
    group: str
    """Kind of the Megatron tensor in a verdict."""
    _: KW_ONLY
    when: str | None = None
    """Setting of the model without which neither side has the tensor."""
    unless: str | None = None
    """Setting with which neither side has it."""
    float32: bool = False
    """Whether it stays float32 where a model is in another type: `_keep_in_fp32_modules_strict` there."""

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors, in the order of their rows."""
        return (self.hf,) if isinstance(self.hf, str) else self.hf

    def pieces(self, sizes: Sizes) -> list[Piece]:
        """Return the blocks, in the order of their rows in the Megatron tensor."""
        shape = _shape(self.axes, sizes)
        first, *rest = (0,) * len(shape)
        return [
            Piece(name, shape, (first, *rest), (number * shape[0], *rest), shape)
            for number, name in enumerate(self.names)
        ]


class QueryKeyValue(Rule):
    """Queries, keys and values in one tensor: for each KV group its query heads, its key, its value.

    `axes` is what follows the rows: `H` for weights, nothing for biases.
    """

    def pieces(self, sizes: Sizes) -> list[Piece]:
        """Return three blocks for each KV group."""
        rest = _shape(self.axes, sizes)
        zeros = (0,) * len(rest)
        rows = (sizes["Q"] // sizes["G"], sizes["D"], sizes["D"])
        found = []
        for group in range(sizes["G"]):
            start = group * sum(rows)
            for name, count in zip(self.names, rows, strict=True):
                whole = (count * sizes["G"], *rest)
                found.append(Piece(name, whole, (group * count, *zeros), (start, *zeros), (count, *rest)))
                start += count
        return found


def _shape(axes: str, sizes: Sizes) -> Shape:
    return tuple(sizes[letter] for letter in axes.split())


def sizes_of(settings: Mapping[str, Any]) -> dict[str, int]:
    """Letter -> size, from the settings of the `model` section.

    V vocabulary, L layers, H hidden, E experts, N heads, G KV groups, D width of a head, Q = N D, K = G D,
    F inner width of a dense layer, I of an expert, J = 2 I (gate and up in one), S of the shared experts.
    Latent attention: A width of the queries' latent, C of that of keys and values, M the same with the
    rotary part of the keys, T queries of all heads, P keys and values of all heads, O values of all heads.
    """
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    groups = settings.get("num_query_groups") or heads
    width = settings.get("kv_channels") or hidden // heads
    inner = settings.get("ffn_hidden_size") or 4 * hidden
    expert = settings.get("moe_ffn_hidden_size") or inner
    latent, plain, rotary, value = (
        settings.get(name) or 0
        for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    )
    return {
        "1": 1,
        "V": settings["vocab_size"],
        "L": settings["num_layers"],
        "H": hidden,
        "E": settings["num_moe_experts"],
        "N": heads,
        "G": groups,
        "D": width,
        "Q": heads * width,
        "K": groups * width,
        "F": inner,
        "I": expert,
        "J": 2 * expert,
        "S": settings.get("moe_shared_expert_intermediate_size") or 0,
        "A": settings.get("q_lora_rank") or 0,
        "C": latent,
        "M": latent + rotary,
        "T": heads * (plain + rotary),
        "P": heads * (plain + value),
        "O": heads * value,
    }


def lay_out(
    settings: Mapping[str, Any], rules: Iterable[tuple[int | None, Rule]], padded_vocab: int | None
) -> WeightMap:
    """Make the map of a model from rules, each with the layer it is for, or None outside of all layers.

    In the checkpoint, tensors of `VOCABULARY` have `padded_vocab` rows; one for each token if None.
    """
    sizes = sizes_of(settings)
    stacked = (settings.get("moe_layer_freq") or 1) == 1  # as Megatron-Core does if layers are of one kind
    hf_shapes: dict[str, Shape] = {}
    megatron_shapes: dict[str, Shape] = {}
    groups: dict[str, str] = {}
    float32: set[str] = set()
    blocks: list[Block] = []
    for layer, rule in rules:
        if (rule.when and not settings.get(rule.when)) or (rule.unless and settings.get(rule.unless)):
            continue
        prefix, megatron = "", rule.megatron
        place: Shape = ()
        axes: Shape = ()
        if layer is not None:
            prefix = f"model.layers.{layer}."
            megatron = "decoder.layers." + ("" if stacked else f"{layer}.") + megatron
            place, axes = ((layer,), (sizes["L"],)) if stacked else ((), ())
        experts: list[Shape] = [()]
        if "{e}" in rule.names[0]:
            experts, axes = [(e,) for e in range(sizes["E"])], (*axes, sizes["E"])
        pieces = rule.pieces(sizes)
        last = pieces[-1]
        megatron_shapes[megatron] = (*axes, last.megatron_offset[0] + last.shape[0], *last.shape[1:])
        groups[megatron] = rule.group
        for expert, piece in itertools.product(experts, pieces):
            name = prefix + piece.hf.format(e=expert[0] if expert else None)
            hf_shapes[name] = piece.hf_shape
            offset = (*place, *expert, *piece.megatron_offset)
            blocks.append(Block(name, piece.hf_offset, megatron, offset, piece.shape))
            float32 |= {name, megatron} if rule.float32 else set()
    vocab = sizes["V"]
    assert padded_vocab is None or padded_vocab >= vocab, f"{padded_vocab} rows for {vocab} tokens"
    padded = {name: vocab for name in VOCABULARY if name in groups}
    for name in padded:
        megatron_shapes[name] = (padded_vocab or vocab, *megatron_shapes[name][1:])
    return WeightMap(hf_shapes, megatron_shapes, tuple(blocks), groups, padded, frozenset(float32))
