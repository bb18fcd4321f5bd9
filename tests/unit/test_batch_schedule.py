"""The batch size of each step, and how many samples a number of steps takes."""

import pytest
from config_fixtures import good_settings, load
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator as megatron

from megatron_dynmix.config.batch_schedule import BatchSchedule, token_steps
from megatron_dynmix.config.check import check_run
from megatron_dynmix.config.load import to_dict
from megatron_dynmix.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")


@st.composite
def ramps(draw):
    increment, steps = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    start = draw(st.integers(1, 20))
    return start + steps * increment, (start, increment, draw(st.integers(1, 500)))


@st.composite
def steps(draw):
    """Batches that grow and shrink, at thresholds that steps cross."""
    thresholds = draw(st.sets(st.integers(1, 400), max_size=5))
    return BatchSchedule(
        tuple((threshold, draw(st.integers(1, 40))) for threshold in [0, *sorted(thresholds)])
    )


def calculators(name):
    """A mark for what only some versions of Megatron-Core have."""
    return pytest.mark.skipif(not hasattr(megatron, name), reason=f"this Megatron-Core has no {name}")


@calculators("RampupBatchsizeNumMicroBatchesCalculator")
@settings(max_examples=200)
@given(ramps(), st.integers(0, 600))
def test_batches_are_those_of_megatron_core(ramp, consumed):
    global_batch_size, (start, increment, samples) = ramp
    calculator = megatron.RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size, 1, 1, False, 1, start, increment, samples
    )
    for at in (consumed, samples - 1, samples, samples + 1):
        calculator.update(at, consistency_check=True)
        size = BatchSchedule.growing(*ramp).batch_size(at)
        assert size == calculator.get_current_global_batch_size(), at


@calculators("StepBatchsizeNumMicroBatchesCalculator")
@settings(max_examples=100)
@given(steps(), st.integers(0, 500))
def test_steps_are_those_of_megatron_core(schedule, consumed):
    length = 128
    text = " ".join(f"{sample * length}:{size}" for sample, size in schedule.steps)
    calculator = megatron.StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, text, length)
    calculator.update(consumed, consistency_check=True)
    ours = BatchSchedule(tuple((tokens // length, size) for tokens, size in token_steps(text)))
    assert ours.batch_size(consumed) == calculator.get_current_global_batch_size()


@settings(max_examples=100)
@given(st.one_of(ramps(), steps()), st.integers(0, 80), st.integers(0, 80))
def test_samples_after_is_the_sum_of_the_steps(given, before, iterations):
    schedule, consumed = given if isinstance(given, BatchSchedule) else BatchSchedule.growing(*given), 0
    for _ in range(before):
        consumed += schedule.batch_size(consumed)
    assert schedule.samples_after(before) == consumed
    assert schedule.samples_after(iterations, consumed) == schedule.samples_after(before + iterations)


def test_a_constant_batch():
    assert BatchSchedule.growing(8).samples_after(1_000_000, 16) == 8_000_016


def test_a_ramp():
    """Four samples more every 16 samples."""
    schedule = BatchSchedule.growing(16, (4, 4, 48))
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
    assert BatchSchedule.of(config) == BatchSchedule(((0, 4), (48, 8)))


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


def official_steps(text, seq_length, consumed):
    """Megatron-LM's rule, in its words: the last threshold, in whole samples, that was reached."""
    pairs = []
    for entry in text.replace(",", " ").split():
        values = []
        for value in entry.upper().split(":"):
            factor = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(value[-1], 1)
            values.append(int(float(value.rstrip("KMBT")) * factor))
        pairs.append((values[0] // seq_length, values[1]))
    return [size for threshold, size in sorted(pairs) if consumed >= threshold][-1]


@pytest.mark.parametrize(
    "text",
    ["0:8", "0:8 1k:16", "0:8,1.5K:16, 4e3:4", "2K:4 0:16 1K:8", "0:8 1K:16 2M:32 1.5b:64 0.25T:128"],
)
def test_a_schedule_by_steps_is_read_as_megatron_lm_reads_it(tmp_path, text):
    content = good_settings(tmp_path)
    del content["training"]["global_batch_size"]
    content["training"]["step_batch_size_schedule"] = text
    content["training"]["micro_batch_size"] = 2
    config = load(tmp_path, content)
    check_run(config, 2)
    schedule = BatchSchedule.of(config)
    for consumed in [*range(0, 70), 10**6, 10**9, 10**12]:
        expected = official_steps(text, config.data.seq_length, consumed)
        assert schedule.batch_size(consumed) == expected, consumed
    assert config.training.global_batch_size == schedule.steps[-1][1]
    assert load(tmp_path, to_dict(config)) == config  # what a run writes is read back


@pytest.mark.parametrize(
    "text",
    [
        *("", "8", "0:8 1K", "5:8", "0:8 0:16", "0:0", "0:8 1K:-8", "0:8 1X:16", "0:8 nan:16", "0:8 inf:16"),
        *(
            "0:8 1e400:16",
            "0:8 0.5:16",
            "0:8.5",
            "0:8 1K:16:3",
            "0:8 K:16",
            "0:8 -1K:16",
            "0:8 1K:1e999999999",
        ),
    ],
)
def test_other_schedules_are_refused(tmp_path, text):
    content = good_settings(tmp_path)
    content["training"] |= {"step_batch_size_schedule": text, "global_batch_size": None}
    with pytest.raises(InputError, match=r"step_batch_size_schedule is .* THRESHOLD:BATCH_SIZE"):
        load(tmp_path, content)


@pytest.mark.parametrize(
    "training, why",
    [
        ({"global_batch_size": 8}, "global_batch_size is 8; it must be 16, with which"),
        ({"global_batch_size": None, "rampup_batch_size": [4, 4, 48]}, "both given; leave out one"),
        ({"global_batch_size": None, "step_batch_size_schedule": "0:8 50:16"}, "fall into the same row"),
        (
            {"global_batch_size": None, "step_batch_size_schedule": "0:6 1K:16"},
            "batch size 6, not a multiple",
        ),
    ],
)
def test_schedules_by_steps_that_do_not_fit_are_refused(tmp_path, training, why):
    content = good_settings(tmp_path)
    content["training"] |= {"step_batch_size_schedule": "0:8 1K:16", "micro_batch_size": 2} | training
    with pytest.raises(InputError, match=why):
        check_run(load(tmp_path, content), 2)


def test_batches_done_keep_the_size_they_had():
    """Four steps of 8 are done; then the batch is halved, then grows."""
    schedule = BatchSchedule(((0, 4), (40, 16)), done=((4, 8),))
    assert [schedule.samples_at(i) for i in range(9)] == [0, 8, 16, 24, 32, 36, 40, 56, 72]
