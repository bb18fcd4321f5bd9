"""The main job as a newcomer meets it: one command, two ranks, from nothing."""

import json
import subprocess

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SOURCES = ["chat", "math", "math_again", "code"]


def test_quickstart_learns_finds_the_redundant_sources_and_says_what_to_open(clone, quickstart):
    assert quickstart.returncode == 0, quickstart.stderr
    assert "weight update at iteration       10" in quickstart.stdout
    assert quickstart.stdout.rstrip().splitlines()[-7].startswith("Done. What to open")

    run_dir = clone / "runs/quickstart"
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["iteration"] == 100
    assert metrics[-1]["lm_loss"] < 0.3 * metrics[0]["lm_loss"]

    mixing = [json.loads(line) for line in (run_dir / "mixing.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in mixing] == list(range(10, 101, 10))
    final = dict(zip(SOURCES, mixing[-1]["new_weights"], strict=True))
    assert final["math"] < 0.2 and final["math_again"] < 0.2
    assert abs(final["math"] - final["math_again"]) < 0.02
    for record in mixing:
        assert record["seconds"].keys() == {"signal", "reduce", "update", "rebuild"}

    _check_tensorboard(run_dir)
    assert (run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "100"


def test_quickstart_does_not_write_over_a_run(clone, quickstart):
    command = [".venv/bin/megatron-dynmix", "quickstart"]
    again = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=280)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr and "Traceback" not in again.stderr


def _check_tensorboard(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    per_source = ["weight", "delta", "token-share", "epochs", "lm-loss"]
    wanted = {f"dynmix/{tag}/{source}" for tag in per_source for source in SOURCES}
    wanted |= {"dynmix/entropy", "dynmix/kl-step", "lm loss", "learning-rate", "grad-norm", "batch-size"}
    assert wanted <= set(tags["scalars"])
    assert {"dynmix/gate-load", "dynmix/distance"} <= set(tags["images"])
