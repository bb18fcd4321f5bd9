import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmix.model.boxes import boxes


@st.composite
def parts_of_memory(draw):
    """A part of a tensor, as factories of a checkpoint make it, and a range of the whole one's memory."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    size = math.prod(shape)
    part = torch.arange(size).view(shape).permute(draw(st.permutations(range(len(shape)))))
    axis = draw(st.integers(0, len(shape) - 1))
    parts = part.chunk(draw(st.integers(1, part.shape[axis])), dim=axis)
    start = draw(st.integers(0, size))
    return draw(st.sampled_from(parts)), start, draw(st.integers(start, size))


@given(parts_of_memory())
def test_boxes_hold_what_is_in_the_range_once(given_part):
    part, start, stop = given_part
    first, seen = part.storage_offset(), []
    for offset, shape in boxes(tuple(part.shape), part.stride(), start - first, stop - first):
        box = part[tuple(slice(low, low + size) for low, size in zip(offset, shape, strict=True))]
        assert box.shape == shape and box.numel()
        seen += box.flatten().tolist()
    assert sorted(seen) == [place for place in sorted(part.flatten().tolist()) if start <= place < stop]


def test_a_range_of_a_matrix_is_the_end_of_a_row_whole_rows_and_the_beginning_of_one():
    assert list(boxes((5, 4), (4, 1), 6, 17)) == [((1, 2), (1, 2)), ((2, 0), (2, 4)), ((4, 0), (1, 1))]
    assert list(boxes((5, 4), (4, 1), 5, 7)) == [((1, 1), (1, 2))]
    assert list(boxes((5, 4), (4, 1), -9, 99)) == [((0, 0), (5, 4))]
