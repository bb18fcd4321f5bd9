"""The quickstart, from nothing, then the commands of README and docs, as they stand there, run by bash.

All in one folder like a fresh clone, and in one file, so that one worker trains the quickstart once.
Pages come in the order of PAGES, their blocks from top to bottom, so a command finds what those before it
made. What the docs take for given is made small: the README's RUN.yaml, which all pages use, with SMALL
written over it, and the quickstart's RUN.yaml with SHORT, once it has been trained as it is.
"""

import json
import os
import re
import signal
import subprocess

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.docs_blocks import ROOT, all_blocks, blocks_of

SMALL = {
    "model": {"vocab_size": 1024},
    "data": {"template": "vicuna", "seq_length": 128, "num_workers": 0},
    "mixing": {"interval": 1, "probe_tokens": 1024},
    "training": {"train_iters": 3, "micro_batch_size": 2},
    "checkpoint": {"save_interval": 2},
}
SHORT = {
    "mixing": {"interval": 2},
    "training": {"train_iters": 4},
    "optimizer": {"lr_warmup_iters": 0},
    "checkpoint": {"save_interval": 2},
}
LOADS = '{"chat": [0.3, 0.2, 0.3, 0.2], "math": [0.1, 0.4, 0.1, 0.4], "code": [0.2, 0.2, 0.2, 0.4]}'
SOURCES = ["chat", "math", "math_again", "code"]
COMMANDS = [block for block in all_blocks() if block.is_run]


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
    later = np.mean([record["new_weights"] for record in mixing[5:]], axis=0)  # one update is of few tokens
    share = dict(zip(SOURCES, later.tolist(), strict=True))
    assert share["math"] < 0.2 and share["math_again"] < 0.2
    assert abs(share["math"] - share["math_again"]) < 0.02
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


def write_over(path, settings, changes):
    for section, values in changes.items():
        settings.setdefault(section, {}).update(values)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


@pytest.fixture(scope="module")
def console_script(clone, quickstart, served):
    """In place of the installed one, which has trained the quickstart, the one whose commands are forks."""
    script = clone / ".venv/bin/megatron-dynmix"
    installed = script.readlink()
    script.unlink()
    script.symlink_to(served)
    yield script
    script.unlink()
    script.symlink_to(installed)


@pytest.fixture(scope="module")
def folder(clone, quickstart, console_script):
    """Where the commands are run: with the user's own data, tokenizer and RUN.yaml."""
    assert quickstart.returncode == 0, quickstart.stderr
    made = clone / "runs/quickstart/data"
    write_over(made / "RUN.yaml", yaml.safe_load((made / "RUN.yaml").read_text()), SHORT)
    (clone / "tokenizer").symlink_to(made / "tokenizer")
    (clone / "data").mkdir()
    for name in ("chat", "math", "code"):
        (clone / f"data/{name}.jsonl").symlink_to(made / f"{name}.jsonl")
        (clone / f"data/{name}.dev.jsonl").symlink_to(made / f"{name}.probe.jsonl")
    lines = [f'{{"question": "{n} + 2?", "answer": "It is {n + 2}."}}\n' for n in range(50)]
    (clone / "data/gsm8k.jsonl").write_text("".join(lines))
    (clone / "loads.json").write_text(LOADS)
    (settings,) = (block.text for block in blocks_of(ROOT / "README.md") if block.language == "yaml")
    write_over(clone / "RUN.yaml", yaml.safe_load(settings), SMALL)
    return clone


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: f"{block.page}:{block.line}")
def test_commands_of_the_docs_run(block, folder, terminal):
    served = block.mark is not None
    script = f"set -euo pipefail\n{block.text}"
    path = f"{folder}/.venv/bin:{terminal['PATH']}"
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env={**terminal, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = []
    try:
        for line in shell.stdout:
            said.append(line)
            if served and re.search(r"http://\S+:\d+", line):
                os.killpg(shell.pid, signal.SIGKILL)
        code = shell.wait(timeout=60)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    output = "".join(said)
    told = f"{block.page}:{block.line} ended with {code}:\n{block.text}\n{output}"
    assert code == (-signal.SIGKILL if served else 0), told
    assert "Traceback" not in output, told
