"""What befalls a run: skipped iterations, steps not applied, reruns, growing batches, checkpoints."""

import re

import pytest

from megatron_dynmix.cli import main
from tests.stock.engine import records, updates_of
from tests.stock.states import assert_equal_states, state_of

GATE_LOAD = ("--dynmix-strategy", "gate-load", "--dynmix-interval", "2", "--dynmix-eta", "50")


def rows_of(run_dir):
    return [sum(line["rows"]) for line in records(run_dir)]


def test_a_skipped_iteration_is_drawn_and_not_trained_on(stock, tmp_path):
    run_dir = tmp_path / "run"
    flags = (*GATE_LOAD, "--dynmix-run-dir", str(run_dir), "--iterations-to-skip", "2", "3")
    stock(1, *flags)
    updates = records(run_dir)
    assert [line["iteration"] for line in updates] == [2, 4, 6]
    assert rows_of(run_dir) == [16, 32, 48]
    trained = [sum(line["tokens"]) for line in updates]
    assert trained[-1] == 4 * 8 * 64 and trained == sorted(trained)
    assert main(["verify", str(run_dir)]) == 0


def test_a_step_that_overflows_is_drawn_and_not_counted(stock, tmp_path):
    """Half precision begins with a loss scale at which the first steps are not applied."""
    run_dir = tmp_path / "run"
    half = ("--fp16", "--initial-loss-scale", str(2**26), "--hysteresis", "1")
    run = stock(1, *GATE_LOAD, *half, "--log-interval", "6", "--dynmix-run-dir", str(run_dir))
    skipped = int(re.findall(r"number of skipped iterations: +(\d+)", run.texts[0])[-1])
    assert 0 < skipped < 6
    assert [line["skipped_iterations"] for line in records(run_dir, "metrics")] == [skipped]
    assert rows_of(run_dir) == [16, 32, 48]
    assert sum(records(run_dir)[-1]["tokens"]) == (6 - skipped) * 8 * 64
    assert main(["verify", str(run_dir)]) == 0


REPEATED = {
    "one rank": (1, ()),
    "virtual stages": (
        2,
        ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
    ),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] if name != "one rank" else []) for name in REPEATED],
)
def test_a_pass_that_is_run_again_counts_once(stock, tmp_path, layout):
    """The rerun machine doubts every pass but the first, repeats it and goes on."""
    ranks, flags = REPEATED[layout]
    flags = (*GATE_LOAD, *flags, "--num-layers", "4", "--no-check-for-nan-in-loss-and-grad")
    once = stock(ranks, *flags, "--dynmix-run-dir", str(tmp_path / "once"))
    doubts = ("--check-for-spiky-loss", "--error-injection-rate", "1")
    twice = stock(ranks, *flags, *doubts, "--dynmix-run-dir", str(tmp_path / "twice"))
    assert twice.texts[-1].count("Injecting error") == 5
    assert twice.losses == once.losses
    assert updates_of(tmp_path / "twice") == updates_of(tmp_path / "once")
    first, again = (
        [line["source_loss"] for line in records(tmp_path / name, "metrics")] for name in ("once", "twice")
    )
    assert first == again
    assert main(["verify", str(tmp_path / "twice")]) == 0


@pytest.mark.slow
def test_a_step_that_a_persistent_error_leaves_undone_is_trained_after_the_restart(stock, tmp_path):
    """The rerun machine ends the job in a step with a checkpoint from before it, and exit code 16."""
    save = ("--save", str(tmp_path / "ck"))
    stock(1, *GATE_LOAD, *save, "--dynmix-run-dir", str(tmp_path / "whole"))
    expected = state_of(tmp_path / "ck", 6)
    flags = (*GATE_LOAD, "--save", str(tmp_path / "ck2"), "--dynmix-run-dir", str(tmp_path / "run"))
    error = ("--error-injection-rate", "1", "--error-injection-type", "persistent_error")
    stopped = stock(1, *flags, *error, "--save-interval", "1", code=16)
    assert len(stopped.losses) == 1
    stock(1, *flags, "--load", str(tmp_path / "ck2"), "--rerun-mode", "disabled")
    assert_equal_states(state_of(tmp_path / "ck2", 6), expected)
    assert updates_of(tmp_path / "run") == updates_of(tmp_path / "whole")
    assert main(["verify", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_growing_batches_change_the_mix_at_the_same_iterations(stock, tmp_path):
    run_dir = tmp_path / "run"
    run = stock(1, *GATE_LOAD, *ramp(), "--dynmix-run-dir", str(run_dir))
    assert [line["iteration"] for line in records(run_dir)] == [2, 4, 6]
    drawn = rows_of(run_dir)
    assert drawn[0] == 8 and drawn[-1] > 24, "the batch grew"
    assert f"consumed samples: {drawn[-1]:12d}" in run.printed[-2]
    assert main(["verify", str(run_dir)]) == 0


def ramp():
    """Batches from 4 to 8, in the words of the version at hand."""
    from megatron.core.package_info import MAJOR, MINOR

    if (MAJOR, MINOR) >= (0, 18):
        return ("--step-batch-size-schedule", "0:4 1024:8")
    return ("--rampup-batch-size", "4", "4", "16")


def test_a_checkpoint_without_a_mix_is_gone_on_from(stock, tmp_path):
    save = ("--save", str(tmp_path / "ck"))
    stock(1, *save, "--exit-interval", "3", mixed=False)
    run_dir = tmp_path / "run"
    run = stock(1, *save, "--load", str(tmp_path / "ck"), *GATE_LOAD, "--dynmix-run-dir", str(run_dir))
    assert "holds no mix: one begins here" in run.texts[0]
    assert len(run.losses) == 3
    assert [line["iteration"] for line in records(run_dir)] == [2]
    assert main(["verify", str(run_dir)]) == 0


def test_plain_stock_loads_our_checkpoint(stock, tmp_path):
    save = ("--save", str(tmp_path / "ck"))
    stock(1, *GATE_LOAD, *save, "--exit-interval", "3")
    plain = stock(1, *save, "--load", str(tmp_path / "ck"), mixed=False)
    assert len(plain.losses) == 3


def test_finetune_begins_a_fresh_mix(stock, tmp_path):
    stock(1, *GATE_LOAD, "--save", str(tmp_path / "ck"))
    run_dir = tmp_path / "run"
    stock(1, *GATE_LOAD, "--load", str(tmp_path / "ck"), "--finetune", "--dynmix-run-dir", str(run_dir))
    assert rows_of(run_dir) == [16, 32, 48]
    assert records(run_dir)[0]["old_weights"] == [0.5, 0.3, 0.2]


@pytest.mark.parametrize(("ranks", "flags"), [(1, ()), (2, ("--micro-batch-size", "1"))])
def test_a_mix_goes_on_in_another_layout(stock, tmp_path, ranks, flags):
    """Stopped in mid-interval on two expert-parallel ranks: what follows counts what it would have."""
    save = ("--save", str(tmp_path / "ck"), "--ckpt-fully-parallel-save")
    begin = (*GATE_LOAD, *save, "--expert-model-parallel-size", "2", "--exit-interval", "3")
    stock(2, *begin, "--dynmix-run-dir", str(tmp_path / "run"))
    more = (*GATE_LOAD, *save, "--load", str(tmp_path / "ck"), "--no-load-optim", "--no-load-rng", *flags)
    stock(ranks, *more, "--dynmix-run-dir", str(tmp_path / "run"))
    second = records(tmp_path / "run")[1]
    assert second["iteration"] == 4 and sum(second["rows"]) == 32
    assert main(["verify", str(tmp_path / "run")]) == 0


REFUSED = {
    "held-out rows": (("--dynmix-signal", "probe"), "--dynmix-signal probe"),
    "another order": (("--dataloader-type", "cyclic"), "--dataloader-type is cyclic"),
    "no strategy": (("--dynmix-strategy", "best"), "best"),
    "names": (("--dynmix-names", "a", "b"), "--dynmix-names gives 2 names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_ends_with_two_before_a_model_is_built(stock, name):
    flags, words = REFUSED[name]
    run = stock(1, *flags, code=2)
    (message,) = [line for line in run.texts[0].splitlines() if line.startswith("megatron-dynmix:")]
    assert words in message
    assert "building GPT model" not in run.texts[0] and "number of parameters" not in run.texts[0]
