"""Whole small runs, compared with one another."""

import numpy as np
import pytest

from tests.distributed import programs
from tests.distributed.ranks import run_ranks

EP1 = ["--expert-model-parallel-size", "1"]


def losses(result):
    return [record["lm_loss"] for record in result["metrics"]]


def weights(result):
    return [record["new_weights"] for record in result["mixing"]]


@pytest.fixture(scope="module")
def ep2(run_yaml, start_from, tmp_path_factory):
    return run_ranks(2, programs.train, run_yaml, start_from, tmp_path_factory.mktemp("ep2"))[0]


def test_I1_two_runs_with_one_seed_are_equal(ep2, run_yaml, start_from, tmp_path):
    again = run_ranks(2, programs.train, run_yaml, start_from, tmp_path)[0]
    assert losses(again) == losses(ep2)
    assert weights(again) == weights(ep2)
    assert [r["load"] for r in again["mixing"]] == [r["load"] for r in ep2["mixing"]]
    assert again["blend"] == ep2["blend"]


@pytest.mark.parametrize("world_size, layout", [(1, EP1), (4, [])], ids=["1 rank", "EP2 x DP2"])
def test_I3_the_order_does_not_depend_on_the_layout(world_size, layout, ep2, run_yaml, start_from, tmp_path):
    other = run_ranks(world_size, programs.train, run_yaml, [*start_from, *layout], tmp_path)[0]
    # tokens per source after every iteration: another order would show
    assert [r["tokens"] for r in other["metrics"]] == [r["tokens"] for r in ep2["metrics"]]
    assert [r["rows"] for r in other["mixing"]] == [r["rows"] for r in ep2["mixing"]]
    np.testing.assert_allclose(losses(other), losses(ep2), rtol=1e-4)
    np.testing.assert_allclose(weights(other), weights(ep2), atol=1e-3)


def test_I1_another_seed_gives_another_run(ep2, run_yaml, start_from, tmp_path):
    other = run_ranks(2, programs.train, run_yaml, [*start_from, "--seed", "7"], tmp_path)[0]
    assert losses(other) != losses(ep2)


@pytest.mark.parametrize("signal", ["probe", "train"])
def test_I7_measuring_changes_nothing(signal, run_yaml, start_from, tmp_path):
    off = run_ranks(2, programs.train, run_yaml, [*start_from, "--strategy", "uniform"], tmp_path / "off")[0]
    measured = [*start_from, "--signal", signal, "--eta", "0"]
    on = run_ranks(2, programs.train, run_yaml, measured, tmp_path / "on")[0]
    assert len(on["mixing"]) == 2 and not off["mixing"]
    assert losses(on) == losses(off)
    assert [r["grad_norm"] for r in on["metrics"]] == [r["grad_norm"] for r in off["metrics"]]
    assert [r["tokens"] for r in on["metrics"]] == [r["tokens"] for r in off["metrics"]]
    for name, router in off["routers"].items():
        assert np.array_equal(router, on["routers"][name]), name


@pytest.mark.parametrize(
    "world_size, flags",
    [(1, [*EP1, "--micro-batch-size", "1"]), (1, [*EP1, "--micro-batch-size", "8"]), (4, [])],
    ids=["micro-batch 1", "micro-batch 8", "DP4"],
)
def test_I10_loss_is_the_mean_over_trained_tokens_of_the_global_batch(
    world_size, flags, run_yaml, start_from, tmp_path
):
    alike = [*start_from, "--moe-aux-loss-coeff", "0"]  # which is a mean per micro-batch by definition
    one = run_ranks(1, programs.count_one_step, run_yaml, [*alike, *EP1], tmp_path / "one")[0]
    other = run_ranks(world_size, programs.count_one_step, run_yaml, [*alike, *flags], tmp_path / "other")[0]
    assert np.array_equal(one["trained_D"], other["trained_D"])
    assert one["lm_loss"] == one["loss_sum_D"].sum() / one["trained_D"].sum()
    np.testing.assert_allclose(other["lm_loss"], one["lm_loss"], rtol=1e-6)
    np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("signal", ["probe", "train"])
def test_I2_a_run_resumed_inside_an_interval_equals_one_that_was_not_stopped(
    signal, run_yaml, start_from, tmp_path
):
    settings = [*start_from, "--signal", signal, "--interval", "3", "--train-iters", "7"]
    whole = run_ranks(2, programs.train, run_yaml, settings, tmp_path / "whole")[0]
    first = [*settings, "--train-iters", "5", "--lr-decay-iters", "7"]
    run_ranks(2, programs.train, run_yaml, first, tmp_path / "parts")
    parts = run_ranks(2, programs.train, run_yaml, settings, tmp_path / "parts", resume="must")[0]
    assert losses(parts) == losses(whole)
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


def test_loss_that_is_not_a_number_stops_the_run_and_names_the_good_checkpoint(
    run_yaml, start_from, tmp_path
):
    message = run_ranks(2, programs.train_until_stopped, run_yaml, [*start_from, "--lr", "1e30"], tmp_path)[0]
    assert message is not None and "the loss of iteration" in message
    good = message.split("is kept in ")[1].split(";")[0]
    assert good.endswith("iter_0000001")
    resumed = [*start_from, "--lr", "1e-4", "--train-iters", "1"]
    again = run_ranks(2, programs.train, run_yaml, resumed, tmp_path, resume="must")[0]
    assert len(again["metrics"]) == 1
