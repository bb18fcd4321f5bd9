"""The main job as a newcomer meets it: one command, two ranks, from nothing."""

import json
import subprocess

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SOURCES = ["chat", "math", "math_again", "code"]


def test_quickstart_learns_finds_the_redundant_sources_and_says_what_to_open(clone, quickstart):
    assert quickstart.returncode == 0, quickstart.stderr
    assert "weight update at iteration       10" in quickstart.stdout
    _check_start(quickstart.stdout.partition(" iteration        5/")[0])
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


def test_quickstart_does_not_write_over_a_run(clone, quickstart, served):
    again = subprocess.run([served, "quickstart"], cwd=clone, capture_output=True, text=True, timeout=280)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr and "Traceback" not in again.stderr


def _check_start(start_of_the_log):
    """Sources, model, layout, memory, and where everything is written, before the first iteration."""
    for name in SOURCES:
        assert start_of_the_log.count(f"\n{name} ") >= 3, "prepared, packed, drawn"
    for part in ("model    tiny: ", "layout   2 ranks = ", "memory of a rank", "a rank needs about "):
        assert part in start_of_the_log, part
    assert "everything is written to runs/quickstart:\n  config.yaml " in start_of_the_log


def _check_tensorboard(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    per_source = ["weight", "delta", "token-share", "epochs", "lm-loss"]
    wanted = {f"dynmix/{tag}/{source}" for tag in per_source for source in SOURCES}
    wanted |= {"dynmix/entropy", "dynmix/kl-step", "lm loss", "learning-rate", "grad-norm", "batch-size"}
    wanted |= {"dynmix/expert-load/layer-0", "dynmix/seconds/signal"}
    assert wanted <= set(tags["scalars"])
    assert {"dynmix/gate-load", "dynmix/distance"} <= set(tags["images"])
    texts = {f"{name}/text_summary" for name in ("config", "versions", "sources")}
    assert {*texts, "custom_scalars__config__"} <= set(tags["tensors"])
    assert "_hparams_/session_start_info" in events.summary_metadata
