"""A small comparison as a user meets it: cells fail alone, go on where they were, and are not mixed up."""

import json
import shutil
import sys

import numpy as np
import pytest

from megatron_dynmix.cli import main
from megatron_dynmix.commands.quickstart import make_quickstart

SMALL = [
    *("--expert-model-parallel-size", "1", "--hidden-size", "32", "--ffn-hidden-size", "48"),
    *("--seq-length", "128", "--micro-batch-size", "4", "--global-batch-size", "8", "--num-workers", "0"),
    *("--train-iters", "4", "--interval", "2", "--log-interval", "2", "--save-interval", "2"),
    *("--signal", "probe", "--probe-tokens", "1000000", "--lr-warmup-iters", "0"),
]


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory):
    return make_quickstart(tmp_path_factory.mktemp("compare"))


def compare(run_yaml, output, *arguments):
    return main(["compare", str(run_yaml), "--output", str(output), "--seeds", "5", *arguments, *SMALL])


def test_a_cell_that_fails_a_cell_that_goes_on_and_one_that_is_another(
    run_yaml, served, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "executable", str(served))  # cells start with everything loaded
    output = tmp_path / "grid"
    grid = tmp_path / "GRID.yaml"
    grid.write_text("gate-load: {strategy: gate-load}\nbroken: {strategy: uniform, lr: 1.0e+30}\n")
    assert compare(run_yaml, output, "--grid", str(grid), "--jobs", "2") == 1
    out = capsys.readouterr().out
    assert "2 cells, 0 of them finished before" in out and "broken, seed 5: FAILED" in out
    summary = json.loads((output / "comparison.json").read_text())
    (failure,) = summary["failures"]
    assert failure["variant"] == "broken" and "exit code 1" in failure["reason"]
    (variant,) = summary["variants"]
    assert variant["name"] == "gate-load" and variant["seeds"] == [5]
    for name in ("comparison.md", "comparison.html"):
        assert "broken" in (output / name).read_text()

    cell = output / "gate-load" / "seed-5"
    before = _check_evaluation(cell)

    (cell / "evaluation.json").unlink()
    shutil.rmtree(cell / "checkpoints/iter_0000004")
    (cell / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    assert compare(run_yaml, output, "--strategies", "gate-load") == 0
    assert "at iteration 2" in (cell / "log.txt").read_text()
    assert json.loads((cell / "evaluation.json").read_text()) == before

    capsys.readouterr()
    assert compare(run_yaml, output, "--strategies", "gate-load") == 0
    out = capsys.readouterr().out
    assert "1 cells, 1 of them finished before" in out and "started" not in out

    assert compare(run_yaml, output, "--strategies", "gate-load", "--eta", "5") == 2
    assert "eta" in capsys.readouterr().err


def _check_evaluation(cell):
    """The held-out losses are those that a probe of all held-out rows measured at the last iteration."""
    evaluation = json.loads((cell / "evaluation.json").read_text())
    last = [json.loads(line) for line in (cell / "mixing.jsonl").read_text().splitlines()][-1]
    assert last["iteration"] == evaluation["iteration"] == 4
    losses = [evaluation["sources"][name]["loss"] for name in last["sources"]]
    np.testing.assert_allclose(losses, last["probe_loss"], rtol=1e-5)  # batches of other sizes
    assert evaluation["mean_loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert evaluation["worst_loss"] == max(losses)
    tokens = [evaluation["sources"][name]["tokens"] for name in last["sources"]]
    assert evaluation["token_loss"] == pytest.approx(np.average(losses, weights=tokens), rel=1e-12)
    return evaluation


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((), "nothing to compare"),
        (("--strategies", "gate-lode"), "gate-lode"),
        (("--strategies", "uniform", "--jobs", "0"), "--jobs is 0"),
        (("--strategies", "uniform", "--grid", "no.yaml"), "no.yaml cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    run_yaml, tmp_path, capsys, arguments, complaint
):
    assert compare(run_yaml, tmp_path / "grid", *arguments) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()
