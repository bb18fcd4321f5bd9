"""Ranks that are asked to stop, die, hang or never come; numbers that are not finite; clocks that jump."""

import os
import signal
from multiprocessing.connection import wait

import numpy as np
import pytest

from tests.distributed import fault_programs
from tests.distributed.ranks import run_ranks, started_ranks

pytestmark = pytest.mark.alone
SAVING = ["--train-iters", "6", "--interval", "3", "--save-interval", "3"]
SHORT = ["--distributed-timeout-minutes", "0.1"]


def without_clock(records):
    kept = ("seconds", "tokens_per_second")
    return [{name: value for name, value in record.items() if name not in kept} for record in records]


def same(one, other):
    """Two runs' results are equal bit for bit, but for what a clock has measured."""
    assert without_clock(one["metrics"]) == without_clock(other["metrics"])
    assert without_clock(one["mixing"]) == without_clock(other["mixing"])
    assert one["blend"] == other["blend"]
    for name, router in one["routers"].items():
        assert np.array_equal(router, other["routers"][name]), name


@pytest.fixture(scope="module")
def undisturbed(run_yaml, start_from, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    (end, result), _ = run_ranks(2, fault_programs.train, run_yaml, [*start_from, *SAVING], run_dir)
    assert end == "done"
    return result


@pytest.mark.parametrize(
    "place, iteration, rank, signals, saved",
    [
        ("start", 0, 1, [signal.SIGTERM], None),
        ("iteration", 2, 1, [signal.SIGUSR1], 2),
        ("update", 3, 0, [signal.SIGTERM], 4),
        ("save", 3, 1, [signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM], 4),
    ],
)
def test_a_rank_asked_to_stop_stops_all_after_the_iteration_and_the_run_goes_on_as_if_it_had_not(
    place, iteration, rank, signals, saved, undisturbed, run_yaml, start_from, tmp_path
):
    flags = [*start_from, *SAVING]
    ended = run_ranks(
        2, fault_programs.train_signalled, run_yaml, flags, tmp_path, place, iteration, rank, *signals
    )
    assert [end for end, _ in ended] == ["requested", "requested"]
    if saved is None:
        assert "before the first iteration" in ended[0][1]
    else:
        assert f"iter_{saved:07d}, go on with --resume auto" in ended[0][1]
        assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == str(saved)
    (end, result), _ = run_ranks(2, fault_programs.train, run_yaml, flags, tmp_path, resume="auto")
    assert end == "done"
    same(result, undisturbed)


def test_signals_to_all_processes_do_not_tear_a_save(undisturbed, run_yaml, start_from, tmp_path):
    flags = [*start_from, *SAVING]
    ended = run_ranks(2, fault_programs.train_with_group_signalled, run_yaml, flags, tmp_path, 3)
    assert [end for end, _ in ended] == ["requested", "requested"], ended
    (_, result), _ = run_ranks(2, fault_programs.train, run_yaml, flags, tmp_path, resume="must")
    same(result, undisturbed)


def test_a_request_in_the_last_iteration_changes_nothing(undisturbed, run_yaml, start_from, tmp_path):
    flags = [*start_from, *SAVING]
    signalled = ("iteration", 6, 1, signal.SIGTERM)
    (end, result), _ = run_ranks(2, fault_programs.train_signalled, run_yaml, flags, tmp_path, *signalled)
    assert end == "done"
    same(result, undisturbed)


@pytest.mark.parametrize(
    ("every", "extra"),
    [
        pytest.param("1", ["--async-save", "--on-save-error", "continue"], id="async save"),
        pytest.param("9", [], id="no save due", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_has_lost_its_directory_writes_nothing_more(
    every, extra, undisturbed, run_yaml, start_from, tmp_path
):
    """And who comes next takes over from it, as its process has ended, and goes on."""
    flags = [*start_from, *SAVING, "--save-interval", every, *extra]
    ended = run_ranks(2, fault_programs.train_and_lose_the_directory, run_yaml, flags, tmp_path, 4)
    assert [end for end, *_ in ended] == ["stopped", "stopped"]
    assert "has been taken over by a run (pid " in ended[0][1] and ended[1][1] == ""
    assert ended[0][2] == ended[0][3]
    flags = [*start_from, *SAVING]
    (end, result), _ = run_ranks(2, fault_programs.train, run_yaml, flags, tmp_path, resume="auto")
    assert end == "done"
    same(result, undisturbed)


def test_I1_clocks_and_slow_ranks_change_nothing(undisturbed, run_yaml, start_from, tmp_path):
    (end, result), _ = run_ranks(
        2, fault_programs.train_with_wild_clock, run_yaml, [*start_from, *SAVING], tmp_path
    )
    assert end == "done"
    same(result, undisturbed)


SKIP = ["--nonfinite", "skip", "--signal", "train", "--interval", "3", "--train-iters", "6"]


def test_a_skipped_batch_changes_nothing_and_all_ranks_agree(run_yaml, start_from, tmp_path):
    """NaN on one rank: its rows are drawn and gone, the weights and the counts are those before."""
    flags = [*start_from, *SKIP]
    ends = run_ranks(2, fault_programs.train_with_nan, run_yaml, flags, tmp_path / "skip", [3], 1)
    assert [end for end, _ in ends] == ["done", "done"]
    metrics = ends[0][1]["metrics"]
    assert [record["skipped_iterations"] for record in metrics] == [0, 0, 1, 0, 0, 0]
    assert [record["consumed_samples"] for record in metrics] == [8, 16, 24, 32, 40, 48]
    assert metrics[2]["tokens"] == metrics[1]["tokens"] and metrics[2]["lm_loss"] == "NaN"
    assert np.isfinite([record["lm_loss"] for record in metrics if record["iteration"] != 3]).all()
    # the update after iteration 3 saw the loads of iterations 1 and 2 alone
    two = [*start_from, *SKIP, "--interval", "2", "--train-iters", "2", "--lr-decay-iters", "6"]
    (_, short), _ = run_ranks(2, fault_programs.train, run_yaml, two, tmp_path / "two")
    assert ends[0][1]["mixing"][0]["load"] == short["mixing"][0]["load"]
    assert ends[0][1]["mixing"][0]["new_weights"] == short["mixing"][0]["new_weights"]


def test_I2_skipped_batches_are_part_of_the_state(run_yaml, start_from, tmp_path):
    flags, spoiled = [*start_from, *SKIP, "--log-interval", "2"], ([2, 3, 5], 0)
    (_, whole), _ = run_ranks(2, fault_programs.train_with_nan, run_yaml, flags, tmp_path / "a", *spoiled)
    first = [*flags, "--train-iters", "3", "--lr-decay-iters", "6", "--log-interval", "9"]
    run_ranks(2, fault_programs.train_with_nan, run_yaml, first, tmp_path / "b", *spoiled)
    parts = run_ranks(
        2, fault_programs.train_with_nan, run_yaml, flags, tmp_path / "b", *spoiled, resume="must"
    )
    result = parts[0][1]
    assert result["metrics"][-1]["tokens"] == whole["metrics"][-1]["tokens"]
    assert result["metrics"][-1]["lm_loss"] == whole["metrics"][-1]["lm_loss"]
    for update in (*result["mixing"], *whole["mixing"]):  # the first part was to end after three
        del update["signal"]["train_iters"], update["signal"]["run_rows"]
    assert result["mixing"] and without_clock(result["mixing"]) == without_clock(whole["mixing"])
    for name, router in whole["routers"].items():
        assert np.array_equal(router, result["routers"][name]), name


@pytest.mark.slow
def test_ten_batches_skipped_in_a_row_stop_the_run_over_a_resume_too(run_yaml, start_from, tmp_path):
    spoiled = (range(3, 99), 1)
    flags = [*start_from, *SKIP, "--save-interval", "1"]
    ends = run_ranks(2, fault_programs.train_with_nan, run_yaml, flags, tmp_path, *spoiled)
    assert ends[0][0] == "done"  # four skipped at the end
    longer = [*flags, "--train-iters", "20"]
    ends = run_ranks(2, fault_programs.train_with_nan, run_yaml, longer, tmp_path, *spoiled, resume="must")
    assert [end for end, _ in ends] == ["stopped", "stopped"]
    assert "iteration 12 brought a loss of" in ends[0][1] and "like the 9 before it" in ends[0][1]


def test_expert_bias_is_taken_back_too(run_yaml, start_from, tmp_path):
    begin = start_from[: start_from.index("--pretrained-checkpoint")]
    bias = ["--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"]
    flags = [*begin, *bias, *SKIP, "--moe-router-bias-update-rate", "0.5"]
    states = [
        run_ranks(1, fault_programs.expert_bias_after, run_yaml, one, tmp_path / name, iterations)[0]
        for name, one, iterations in [
            ("one", [*flags, "--train-iters", "1", "--expert-model-parallel-size", "1"], []),
            ("two", [*flags, "--train-iters", "2", "--expert-model-parallel-size", "1"], [2]),
        ]
    ]
    assert states[0] and states[0].keys() == states[1].keys()
    for name, bias in states[0].items():
        assert np.array_equal(bias, states[1][name]), name


def outcome(pipe, timeout):
    """What a rank answered within the time; `gone` for one that died."""
    assert wait([pipe], timeout), f"no answer within {timeout} s"
    try:
        failure, answer = pipe.recv()
    except EOFError:
        return "gone", None
    return ("failed", failure) if failure else answer


@pytest.mark.parametrize("lost", [1, 0])
def test_a_killed_rank_is_named_by_another(lost, run_yaml, start_from, tmp_path):
    signalled = ("iteration", 2, lost, signal.SIGKILL)
    with started_ranks(
        3, fault_programs.train_signalled, run_yaml, [*start_from, *DP3], tmp_path, *signalled
    ) as (_, pipes):
        answers = [outcome(pipe, 60) for pipe in pipes]
    assert answers[lost] == ("gone", None)
    others = [answer for rank, answer in enumerate(answers) if rank != lost]
    assert all(end == "stopped" for end, _ in others), others
    said = [text for _, text in others if text]
    if lost == 0:  # and the store with it, in a job that no launcher holds together
        assert all("does not answer: its host or the network is gone" in text for text in said)
    else:
        assert said, "one of the others says it; on a busy machine both may"
        for text in said:
            assert f"iteration 2 could not be finished: rank {lost} (" in text
            assert "is gone or frozen" in text and "rank 0 (" not in text and "rank 2 (" not in text
            assert "Collectives wait 10 minutes" in text and "--resume auto" in text


DP3 = ["--expert-model-parallel-size", "1", "--global-batch-size", "6"]


def test_a_frozen_rank_is_named_when_the_time_is_over(run_yaml, start_from, tmp_path):
    signalled = ("iteration", 2, 1, signal.SIGSTOP)
    flags = [*start_from, *SHORT]
    with started_ranks(2, fault_programs.train_signalled, run_yaml, flags, tmp_path, *signalled) as (
        processes,
        pipes,
    ):
        end, text = outcome(pipes[0], 60)
    assert end == "stopped"
    assert f"rank 1 ({os.uname().nodename}, local rank 1, pid {processes[1].pid}, last heard in" in text
    assert "is gone or frozen. Collectives wait 0.1 minutes" in text


def test_a_rank_that_fails_by_itself_is_named_with_its_message_elsewhere(run_yaml, start_from, tmp_path):
    with started_ranks(2, fault_programs.train_with_bug, run_yaml, start_from, tmp_path) as (_, pipes):
        answers = [outcome(pipe, 60) for pipe in pipes]
    assert answers[1][0] == "failed" and "ZeroDivisionError" in answers[1][1]
    end, text = answers[0]
    assert end == "stopped" and "rank 1 (" in text and "failed with a message of its own" in text


def test_a_rank_that_never_comes_is_named(run_yaml, start_from, tmp_path):
    flags = [*start_from, *SHORT]
    with started_ranks(2, fault_programs.never_join, 1, run_yaml, flags, tmp_path) as (_, pipes):
        end, text = outcome(pipes[0], 60)
    assert end == "stopped"
    assert "1 of 2 ranks did not come to 127.0.0.1:" in text
    assert "within 0.1 minutes: rank 1. Look" in text


def test_a_meeting_place_that_is_not_there_is_named(run_yaml, start_from, tmp_path):
    flags = [*start_from, *SHORT]
    with started_ranks(2, fault_programs.miss_the_others, run_yaml, flags, tmp_path) as (_, pipes):
        end, text = outcome(pipes[1], 60)
    assert end == "stopped"
    assert "cannot reach 127.0.0.1:1, where the ranks meet, within 0.1 minutes" in text
    assert "Connection refused" in text and "MASTER_ADDR" in text
