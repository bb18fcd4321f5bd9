"""The batch size of each step, and how many samples a number of steps takes."""

import pytest
from config_fixtures import good_settings, load
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.check import check_run
from megatron_dynmix.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")


@st.composite
def ramps(draw):
    increment, steps = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    start = draw(st.integers(1, 20))
    return BatchSchedule(start + steps * increment, (start, increment, draw(st.integers(1, 500))))


@settings(max_examples=200, deadline=None)
@given(ramps(), st.integers(0, 600))
def test_batches_are_those_of_megatron_core(schedule, consumed):
    start, increment, samples = schedule.rampup
    calculator = RampupBatchsizeNumMicroBatchesCalculator(
        schedule.global_batch_size, 1, 1, False, 1, start, increment, samples
    )
    calculator.update(consumed, consistency_check=True)
    assert schedule.batch_size(consumed) == calculator.get_current_global_batch_size()


@settings(max_examples=200, deadline=None)
@given(ramps(), st.integers(0, 80), st.integers(0, 80))
def test_samples_after_is_the_sum_of_the_steps(schedule, before, iterations):
    consumed = 0
    for _ in range(before):
        consumed += schedule.batch_size(consumed)
    assert schedule.samples_after(before) == consumed
    assert schedule.samples_after(iterations, consumed) == schedule.samples_after(before + iterations)


def test_a_constant_batch():
    assert BatchSchedule(8).samples_after(1_000_000, 16) == 8_000_016


def test_a_ramp():
    """Four samples more every 16 samples."""
    schedule = BatchSchedule(16, (4, 4, 48))
    sizes, consumed = [], 0
    for _ in range(9):
        sizes.append(schedule.batch_size(consumed))
        consumed += sizes[-1]
    assert sizes == [4, 4, 4, 4, 8, 8, 12, 12, 16]


RAMP = {"rampup_batch_size": [4, 4, 48]}


@pytest.mark.parametrize(
    "flags", [["--rampup-batch-size", "4", "4", "48"], ["--rampup-batch-size", "[4, 4, 48]", "--bf16"]]
)
def test_megatrons_three_words_and_a_list_are_understood(tmp_path, flags):
    assert load(tmp_path, good_settings(tmp_path), flags).training.rampup_batch_size == (4, 4, 48)


def test_a_ramp_in_yaml(tmp_path):
    content = good_settings(tmp_path)
    content["training"].update(RAMP)
    config = load(tmp_path, content)
    check_run(config, 2)
    assert BatchSchedule.of(config.training) == BatchSchedule(8, (4, 4, 48))


@pytest.mark.parametrize(
    "ramp, why",
    [
        ([4, 4], "START INCREMENT SAMPLES"),
        ([4, 4, 0], "START INCREMENT SAMPLES"),
        ([8, 4, 48], "start below 8"),
        ([12, 4, 48], "start below 8"),
        ([4, 3, 48], "start below 8, a multiple of the step away"),
        ([2, 6, 48], "multiples of 4"),
        (["4", 4, 48], "rampup_batch_size"),
    ],
)
def test_impossible_ramps_are_refused(tmp_path, ramp, why):
    content = good_settings(tmp_path)
    content["training"]["rampup_batch_size"] = ramp
    with pytest.raises(InputError, match=why):
        check_run(load(tmp_path, content), 2)
