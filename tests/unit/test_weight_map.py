"""A weight map is taken only if every number of either side is in exactly one block."""

import dataclasses

import pytest

from megatron_dynmix.convert.weight_map import Block, WeightMap

# Two tensors a, b [2, 3] of Hugging Face under one another in a layer of w [2, 4, 3]; c, d likewise.
BLOCKS = tuple(
    Block(name, (0, 0), "w", (layer, row, 0), (2, 3))
    for name, layer, row in (("a", 0, 0), ("b", 0, 2), ("c", 1, 0), ("d", 1, 2))
)
GOOD = WeightMap(
    hf_shapes=dict.fromkeys("abcd", (2, 3)),
    megatron_shapes={"w": (2, 4, 3)},
    blocks=BLOCKS,
    groups={"w": "mlp"},
)


def changed(number, **changes):
    """The good blocks with one of them changed."""
    blocks = list(BLOCKS)
    blocks[number] = dataclasses.replace(blocks[number], **changes)
    return {"blocks": tuple(blocks)}


def test_what_it_says_of_its_tensors():
    assert GOOD.parameters == 24
    assert GOOD.group_of("c") == "mlp"


@pytest.mark.parametrize(
    ("offset", "shape", "names"),
    [
        ((0, 0, 0), (2, 4, 3), "abcd"),
        ((1, 0, 0), (1, 4, 3), "cd"),
        ((0, 1, 2), (2, 1, 1), "ac"),
        ((0, 1, 0), (1, 2, 3), "ab"),
        ((1, 3, 1), (1, 1, 1), "d"),
    ],
)
def test_blocks_that_meet_a_box(offset, shape, names):
    assert [part.block.hf for part in GOOD.megatron.parts_in("w", offset, shape)] == list(names)


def test_rows_that_pad_the_vocabulary_are_in_no_block():
    padded = WeightMap(
        hf_shapes={"a": (3, 2)},
        megatron_shapes={"w": (5, 2)},
        blocks=(Block("a", (0, 0), "w", (0, 0), (3, 2)),),
        groups={"w": "embedding"},
        padded={"w": 3},
    )
    assert padded.parameters == 6
    assert not list(padded.megatron.parts_in("w", (3, 0), (2, 2)))
    with pytest.raises(AssertionError, match="its blocks hold 6 numbers"):
        dataclasses.replace(padded, padded={})


BAD = {
    "left out": ({"blocks": BLOCKS[:3], "hf_shapes": dict.fromkeys("abc", (2, 3))}, "hold 6 numbers"),
    "a layer left out": ({"megatron_shapes": {"w": (3, 4, 3)}}, r"no block at \[\(2,\)\]"),
    "twice": ({"blocks": (*BLOCKS, BLOCKS[0])}, "hold 12 numbers"),
    "overlap": (changed(1, megatron_offset=(0, 1, 0)), "overlap"),
    "sticks out": (changed(1, megatron_offset=(0, 3, 0)), "sticks out"),
    "swapped layers": (changed(1, megatron_offset=(1, 2, 0)), "hold 6 numbers"),
    "larger than its tensor": ({"hf_shapes": {**GOOD.hf_shapes, "a": (1, 3)}}, "sticks out"),
    "a tensor without blocks": ({"hf_shapes": {**GOOD.hf_shapes, "e": (2, 3)}}, "blocks and shapes"),
    "a tensor of no kind": ({"groups": {}}, "one group"),
}


@pytest.mark.parametrize("name", BAD)
def test_maps_with_gaps_or_overlaps_are_not_made(name):
    changes, message = BAD[name]
    with pytest.raises(AssertionError, match=message):
        dataclasses.replace(GOOD, **changes)
