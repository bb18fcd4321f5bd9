"""The commands of README and docs, as they stand there, run by bash in one folder like a fresh clone.

Pages come in the order of PAGES, their blocks from top to bottom, so a command finds what those before it
made. What the docs take for given is made small: the README's RUN.yaml, which all pages use, with SMALL
written over it, and the quickstart's RUN.yaml with SHORT, once it has been trained as it is.
"""

import os
import re
import signal
import subprocess

import pytest
import yaml

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
COMMANDS = [block for block in all_blocks() if block.is_run]


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
