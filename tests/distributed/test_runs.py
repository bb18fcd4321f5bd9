"""Whole small runs, compared with one another."""

import numpy as np
import pytest

from tests.distributed import programs
from tests.distributed.conftest import quick_or_slow
from tests.distributed.ranks import run_ranks

EP1 = ["--expert-model-parallel-size", "1"]


def losses(result):
    return [record["lm_loss"] for record in result["metrics"]]


def weights(result):
    return [record["new_weights"] for record in result["mixing"]]


@pytest.fixture(scope="module")
def ep2_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("ep2")


@pytest.fixture(scope="module")
def ep2(run_yaml, start_from, ep2_dir):
    return run_ranks(2, programs.train, run_yaml, start_from, ep2_dir)[0]


def test_I1_another_seed_gives_another_run(ep2, run_yaml, start_from, tmp_path):
    other = run_ranks(2, programs.train, run_yaml, [*start_from, "--seed", "7"], tmp_path)[0]
    assert losses(other) != losses(ep2)


PARTS = {
    "micro-batch 1": (1, [*EP1, "--micro-batch-size", "1"]),
    "micro-batch 8": (1, [*EP1, "--micro-batch-size", "8"]),
    "EP2 x DP2": (4, []),
    "CP2 x EP2, micro-batch 4": (2, ["--context-parallel-size", "2", "--micro-batch-size", "4"]),
}


@pytest.mark.parametrize("name", quick_or_slow(PARTS, {"EP2 x DP2", "CP2 x EP2, micro-batch 4"}))
def test_I10_loss_is_the_mean_over_trained_tokens_of_the_global_batch(name, run_yaml, start_from, tmp_path):
    world_size, flags = PARTS[name]
    alike = [*start_from, "--moe-aux-loss-coeff", "0"]  # which is a mean per micro-batch by definition
    one = run_ranks(1, programs.count_one_step, run_yaml, [*alike, *EP1], tmp_path / "one")[0]
    other = run_ranks(world_size, programs.count_one_step, run_yaml, [*alike, *flags], tmp_path / "other")[0]
    assert np.array_equal(one["trained_D"], other["trained_D"])
    assert one["lm_loss"] == one["loss_sum_D"].sum() / one["trained_D"].sum()
    np.testing.assert_allclose(other["lm_loss"], one["lm_loss"], rtol=1e-6)
    np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], rtol=1e-5)


@pytest.mark.slow
def test_I2_a_run_with_dropout_and_workers_resumed_inside_an_interval(run_yaml, start_from, tmp_path):
    """As the layouts' I2, and with what draws random numbers and logs every other step; parts read ahead."""
    extra, workers = ["--hidden-dropout", "0.1", "--log-interval", "2"], ["--num-workers", "1"]
    settings = [*start_from, "--signal", "train", "--interval", "3", "--train-iters", "7", *extra]
    whole = run_ranks(2, programs.train, run_yaml, settings, tmp_path / "whole")[0]
    first = [*settings, *workers, "--train-iters", "5", "--lr-decay-iters", "7"]
    run_ranks(2, programs.train, run_yaml, first, tmp_path / "parts")
    rest = [*settings, *workers]
    parts = run_ranks(2, programs.train, run_yaml, rest, tmp_path / "parts", resume="must")[0]
    assert parts["metrics"][-1]["tokens"] == whole["metrics"][-1]["tokens"]
    assert losses(parts)[-1] == losses(whole)[-1]
    assert weights(parts) == weights(whole)
    assert [r["load"] for r in parts["mixing"]] == [r["load"] for r in whole["mixing"]]
    assert parts["blend"] == whole["blend"]


def test_frozen_router_keeps_its_weights(run_yaml, start_from, tmp_path):
    lengths = [[*start_from, "--freeze-router", "--train-iters", count] for count in ("1", "3")]
    short, long = (
        run_ranks(2, programs.train, run_yaml, flags, tmp_path / str(index))[0]
        for index, flags in enumerate(lengths)
    )
    for name, router in short["routers"].items():
        assert np.array_equal(router, long["routers"][name]), name


def test_a_loss_that_is_not_a_number_stops_the_run_at_its_last_good_checkpoint(
    run_yaml, start_from, tmp_path
):
    """The second step is enormous: the state after it is kept, but it is the one before that is good."""
    steps = ["--lr", "1e30", "--lr-warmup-iters", "1", "--save-interval", "1"]
    broken = [*start_from, *steps, "--interval", "9"]
    message = run_ranks(2, programs.train_until_stopped, run_yaml, broken, tmp_path)[0]
    assert "iteration 3 brought a loss of" in message
    assert message.split("kept in ")[1].split(";")[0].endswith("iter_0000002")
    assert message.split("trained well is ")[1].split(",")[0].endswith("iter_0000001")
    resumed = [*start_from, "--lr", "1e-3", "--lr-warmup-iters", "1", "--interval", "9"]
    again = run_ranks(2, programs.train, run_yaml, resumed, tmp_path, resume="must")[0]
    assert [record["iteration"] for record in again["metrics"]] == [1, 2, 3, 4]
    assert np.isfinite(losses(again)).all()


def test_a_gradient_that_is_not_a_number_changes_no_weight(run_yaml, start_from, tmp_path):
    begin = start_from[: start_from.index("--pretrained-checkpoint")]
    flags = [*begin, "--init-method-std", "1e30"]
    message = run_ranks(2, programs.train_until_stopped, run_yaml, flags, tmp_path)[0]
    assert "iteration 1 brought a loss of" in message and "gradients that are not all finite" in message
    assert "no earlier checkpoint" in message
    assert (tmp_path / "checkpoints/iter_0000000/run_state.json").is_file()


def test_the_configuration_decides_the_learning_rate_of_a_resumed_run(run_yaml, start_from, tmp_path):
    run_ranks(2, programs.train, run_yaml, [*start_from, "--train-iters", "2"], tmp_path)
    longer = [*start_from, "--train-iters", "4", "--lr", "5e-3", "--lr-decay-style", "constant"]
    result = run_ranks(2, programs.train, run_yaml, longer, tmp_path, resume="must")[0]
    assert [record["lr"] for record in result["metrics"]][2:] == [5e-3, 5e-3]


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--hidden-size", "64"], "hidden_size 32 (now 64)"),
        (["--seq-length", "64"], "data.seq_length was 128"),
        (["--seed", "9"], "training.seed was 1234"),
        (["--template", "tokenizer"], "tokenizer or template of chat"),
    ],
    ids=["model", "rows", "seed", "data"],
)
def test_a_run_is_not_resumed_with_another(flags, why, ep2, ep2_dir, run_yaml, start_from):
    with pytest.raises(AssertionError) as refusal:
        run_ranks(2, programs.train, run_yaml, [*start_from, *flags], ep2_dir, resume="must")
    assert "InputError" in str(refusal.value) and why in str(refusal.value)


def test_a_run_that_is_done_says_so(ep2, ep2_dir, run_yaml, start_from):
    again = run_ranks(2, programs.train, run_yaml, start_from, ep2_dir, resume="auto")[0]
    assert losses(again) == losses(ep2)
