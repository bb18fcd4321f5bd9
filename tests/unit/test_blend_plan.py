"""A blended dataset of stages: appending, going on, saving and loading."""

import json
from itertools import pairwise

import numpy as np
import pytest
from blend_fixtures import blend_of
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmix.data.blend_plan import BlendPlan, BlendState, Draw
from megatron_dynmix.errors import InputError

SIZES = (11, 5, 30)
STAGES = {24: (0.1, 0.8, 0.1), 48: (0.0, 0.5, 0.5), 72: (0.6, 0.2, 0.2)}
STEP = 6


def draw(blend: BlendPlan, first: int, last: int) -> list[Draw]:
    """Draws of the samples first <= i < last, step by step, with the stages of `STAGES`."""
    draws = []
    for sample in range(first, last, STEP):
        if sample in STAGES and sample > blend.stages[-1].start_sample:
            blend.append_stage(sample, np.array(STAGES[sample]))
        blend.advance_to(sample)
        draws += blend.draws(sample, sample + STEP)
    return draws


def test_only_the_chunks_in_use_are_held():
    blend = blend_of(SIZES, (1, 1, 1), 12)
    assert len(blend._chunks) == 1
    blend.advance_to(120)
    assert len(blend._chunks) == 1 and blend.chunk.start.sample == 120
    blend.draws(130, 140)
    assert len(blend._chunks) == 2 and blend.chunk.start.sample == 120
    blend.advance_to(140)
    assert len(blend._chunks) == 1 and blend.chunk.start.sample == 132


def drawn_in_steps(blend: BlendPlan, cuts: list[int], last: int) -> list[Draw]:
    """Draws of all samples before `last`, in steps that end at `cuts`, with the stages of `STAGES`."""
    draws, first = [], blend.stages[-1].start_sample
    for cut in sorted({*cuts, *STAGES, last}):
        if first < cut <= last:
            blend.advance_to(first)
            draws += blend.draws(first, cut)
            first = cut
            if cut in STAGES:
                blend.append_stage(cut, np.array(STAGES[cut]))
    return draws


@settings(max_examples=20)
@given(st.lists(st.integers(1, 299), max_size=40), st.integers(1, 60))
def test_I3_the_order_does_not_depend_on_how_many_samples_a_step_takes(cuts, chunk_size):
    one_by_one, in_steps = (blend_of(SIZES, (1, 1, 1), chunk_size) for _ in range(2))
    assert drawn_in_steps(in_steps, cuts, 300) == drawn_in_steps(one_by_one, list(range(300)), 300)


@settings(max_examples=20)
@given(
    st.lists(st.integers(73, 299), min_size=1, max_size=20),
    st.lists(st.integers(73, 299), max_size=20),
    st.integers(1, 60),
    st.data(),
)
def test_I2_a_run_resumes_at_any_step_and_with_any_batch_size(before, after, chunk_size, data):
    whole, first, resumed = (blend_of(SIZES, (1, 1, 1), chunk_size) for _ in range(3))
    expected = drawn_in_steps(whole, [], 300)
    stop = data.draw(st.sampled_from(before))
    assert drawn_in_steps(first, before, stop) == expected[:stop]
    resumed.resume(BlendState.from_json(json.loads(json.dumps(first.state.to_json()))))
    draws = []
    for begin, end in pairwise(sorted({stop, *(cut for cut in after if cut > stop), 300})):
        resumed.advance_to(begin)
        draws += resumed.draws(begin, end)
    assert draws == expected[stop:]


def test_a_stage_may_begin_beyond_the_chunks_that_a_rank_has_asked_for():
    """The last micro-batches of a step may be other ranks', and a chunk may end before them."""
    asked, whole = blend_of((11, 5, 30), (1, 1, 1), 10), blend_of((11, 5, 30), (1, 1, 1), 10)
    asked.draws(0, 9)
    whole.draws(0, 12)
    for blended in (asked, whole):
        blended.append_stage(12, np.array([0.2, 0.3, 0.5]))
    assert asked.draws(12, 30) == whole.draws(12, 30)
    assert asked.state.to_json() == whole.state.to_json()


def test_stages_are_the_whole_history():
    blend = blend_of(SIZES, (1, 1, 1), 24)
    draw(blend, 0, 96)
    assert [stage.start_sample for stage in blend.stages] == [0, *STAGES]
    assert blend.stages[1].weights == STAGES[24]
    assert blend.weights_D.tolist() == list(STAGES[72])


def test_a_stage_changes_nothing_before_it():
    changed, unchanged = blend_of(SIZES, (1, 1, 1), 48), blend_of(SIZES, (1, 1, 1), 48)
    assert draw(changed, 0, 24) == unchanged.draws(0, 24)
    changed.append_stage(24, np.array(STAGES[24]))
    assert changed.draws(24, 48) != unchanged.draws(24, 48)


def test_I4_every_row_once_per_epoch_before_any_twice():
    blend = blend_of(SIZES, (1, 1, 1), 24)
    draws = draw(blend, 0, 300)
    for dataset_id, size in enumerate(SIZES):
        rows = [row for source, row, _ in draws if source == dataset_id]
        assert len(rows) > 2 * size
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))


def test_the_rows_of_a_source_go_to_its_halves_in_turn_over_epochs_and_stages():
    draws = draw(blend_of(SIZES, (1, 1, 1), 24), 0, 300)
    for dataset_id, size in enumerate(SIZES):
        halves = [half for source, _, half in draws if source == dataset_id]
        assert len(halves) > 2 * size
        assert halves == [ordinal % 2 for ordinal in range(len(halves))]


def test_rows_drawn_are_counted_over_all_stages():
    blend = blend_of(SIZES, (1, 1, 1), 24)
    draws = draw(blend, 0, 90)
    drawn = [sum(source == dataset_id for source, _, _ in draws) for dataset_id in range(3)]
    assert blend.drawn_D(90).tolist() == drawn


@pytest.mark.parametrize("stop", [0, 6, 18, 24, 42, 66, 78, 90, 126])
def test_I2_a_blend_resumes_bit_exactly(stop):
    whole, first, resumed = (blend_of(SIZES, (1, 2, 3), 24) for _ in range(3))
    expected = draw(whole, 0, 180)
    assert draw(first, 0, stop) == expected[:stop]
    resumed.resume(BlendState.from_json(json.loads(json.dumps(first.state.to_json()))))
    assert draw(resumed, stop, 180) == expected[stop:]
    assert resumed.state.to_json() == whole.state.to_json()


def test_the_chunk_size_of_the_checkpoint_stays():
    first, resumed = blend_of(SIZES, (1, 1, 1), 24), blend_of(SIZES, (1, 1, 1), 99)
    resumed.resume(first.state)
    assert resumed.chunk_size == 24 and resumed.chunk.end_sample == 24


@pytest.mark.parametrize(("sizes", "seed"), [((11, 5, 31), 7), ((11, 5), 7), (SIZES, 8)])
def test_other_data_or_seed_is_refused(sizes, seed):
    state = blend_of(SIZES, (1, 1, 1), 12).state
    other = blend_of(sizes, (1,) * len(sizes), 12, seed=seed)
    with pytest.raises(InputError, match=r"seed 7 and sources of \[11, 5, 30\] rows.*same data"):
        other.resume(state)


def test_more_sources_than_a_dataset_id_can_name_are_refused():
    with pytest.raises(InputError, match=r"32767 sources given.*at most 32,766"):
        BlendPlan([1] * 32_767, np.full(32_767, 1 / 32_767), names=["a"] * 32_767, seed=1, chunk_size=1)
