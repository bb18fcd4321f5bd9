"""docs/convert.md, each of its commands: a tiny Mixtral in, trained, out, and asked for text."""

import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_dynmix.cli import main
from megatron_dynmix.commands.quickstart import make_quickstart

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/convert.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def run(line, served, capsys):
    """One command; those that need no ranks of their own in this process, which has all loaded already."""
    program, *arguments = shlex.split(line)
    if program.endswith("megatron-dynmix") and arguments[0] == "convert":
        assert main(arguments) == 0
        return capsys.readouterr().out
    if program.endswith("megatron-dynmix"):
        done = subprocess.run([served, *arguments], capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert program.endswith("python")
    if arguments[0] == "-c":
        exec(arguments[1], {})
        return capsys.readouterr().out
    assert runpy.run_path(str(ROOT / arguments[0]))["main"](arguments[1:]) == 0
    return capsys.readouterr().out


def without_numbers(text):
    return re.sub(r"\d[\d.e-]*", "#", text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_quickstart(tmp_path / "runs/quickstart/data")
    return tmp_path


def test_every_command_of_the_guide(folder, served, capsys):
    (settings,) = blocks("yaml")
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    said = {}
    for line in lines:
        if " train " in line:
            (folder / "runs/tiny/RUN.yaml").write_text(settings)
        said[line.split()[2 if "convert" in line else 1]] = run(line, served, capsys)
    verdicts = [said[way] for way in ("hf-to-megatron", "megatron-to-hf")]
    assert all("equal: logits of 256 tokens through all 2 layers" in text for text in verdicts)
    assert all("CONVERTED: " in text and "holds every value that was read" in text for text in verdicts)
    (shown,) = (line for line in GUIDE.splitlines() if line.startswith("equal: "))
    assert without_numbers(shown) in without_numbers(verdicts[0])
    updates = (folder / "runs/tiny/run/mixing.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in updates] == [5, 10, 15, 20]
    assert "USER: What is 2 + 3? ASSISTANT:" in said["-c"]
