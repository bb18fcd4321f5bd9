"""Every row of the paper's tables, on a model that is small enough for a test."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_dynmix.compare.grid import variants_from_file
from megatron_dynmix.config.check import check_run
from megatron_dynmix.config.load import load_config
from megatron_dynmix.data.tokenizer.fast import train_bpe

ROOT = Path(__file__).parents[2]
PAPER = runpy.run_path(str(ROOT / "examples/paper/paper.py"))
SOURCES = PAPER["SOURCES"]
SHORT = ["--train-iters", "4", "--interval", "2", "--log-interval", "2", "--global-batch-size", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four sources of sums and words, each with words of its own."""
    folder = tmp_path_factory.mktemp("data")
    for place, name in enumerate(SOURCES):
        for part, size in (("train", 60), ("dev", 20)):
            rows = [
                {
                    "conversations": [
                        {"from": "human", "value": f"{name} {n}?"},
                        {"from": "gpt", "value": f"{name * (place + 1)} {n * place}."},
                    ]
                }
                for n in range(size)
            ]
            path = folder / name / f"{part}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_row_is_a_configuration(data, tmp_path, monkeypatch):
    for name, folder in (("MODEL", tmp_path / "model"), ("DATA", data), ("WORK", tmp_path)):
        monkeypatch.setenv(name, str(folder))
    texts = [path.read_text() for path in data.rglob("*.jsonl")]
    train_bpe(texts, 300, tmp_path / "tokenizer")
    make = runpy.run_path(str(ROOT / "tools/tiny_mixtral.py"))["main"]
    assert make(["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "model")]) == 0
    run_yaml = ROOT / "examples/paper/TINY.yaml"
    run = yaml.safe_load(run_yaml.read_text())
    embeddings = PAPER["letter_shares"](data, tmp_path)
    grid = PAPER["grid_of"](["1", "2", "4", "5"], run, tmp_path, embeddings)
    rows = [name for table in "1245" for name in PAPER["ROWS"][table].values()]
    assert sorted(grid) == sorted(rows)
    path = tmp_path / "GRID.yaml"
    path.write_text(yaml.safe_dump(grid))
    for variant in variants_from_file(path):
        config = load_config(run_yaml, variant.flags(1))
        check_run(config, 1)
        assert config.mixing.strategy == grid[variant.name]["strategy"]


@pytest.mark.slow
def test_every_row_is_a_run_and_stands_in_its_table(data, served, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PAPER["subprocess"], "run", _in_process)
    monkeypatch.setattr(sys, "executable", str(served))  # cells start with everything loaded
    output = tmp_path / "out"
    arguments = ["--data", str(data), "--output", str(output), "--tables", "1,2,5", "--jobs", "2"]
    assert PAPER["main"]([*arguments, *SHORT]) == 0
    text = (output / "paper.md").read_text()
    for table in ("1", "2", "5"):
        assert f"## Table {table}" in text
        for title in PAPER["ROWS"][table]:
            assert f"\n| {title} | " in text
    assert "| - |" not in text and "| | chat | general | math | code | mean loss |" in text
    first = {name: first_weights(output, name) for name in ("sent-emb", "dynamic-sent-emb", "data-size")}
    assert first["sent-emb"] == first["dynamic-sent-emb"] and len(set(first["sent-emb"])) == 4
    sizes = np.array([PAPER["SIZES"][name] for name in SOURCES])
    np.testing.assert_allclose(first["data-size"], sizes / sizes.sum(), rtol=0.3)  # rows, not examples
    said = json.loads((output / "similarity/weights-gate-load.json").read_text())
    shares = json.loads((output / "methods/gate-load-static/seed-1/ledger.jsonl").read_text().splitlines()[0])
    assert shares["resolved"]["weights_D"] == pytest.approx([said[name] for name in SOURCES])
    before = [evaluation(output, "without"), evaluation(output, "uniform")]
    assert before[0]["iteration"] == 1 and before[0]["mean_loss"] > before[1]["mean_loss"]
    capsys.readouterr()
    assert PAPER["main"]([*arguments, *SHORT]) == 0, "the same command goes on"
    assert "started" not in capsys.readouterr().out


def _in_process(command, check):
    """Run a tool here: the interpreter's name stands for commands that are served."""
    tool = runpy.run_path(command[1])["main"]
    before, sys.argv = sys.argv, command[1:]
    try:
        assert tool() == 0
    finally:
        sys.argv = before


def first_weights(output, name):
    lines = (output / f"methods/{name}/seed-1/ledger.jsonl").read_text().splitlines()
    return json.loads(lines[0])["weights"]


def evaluation(output, name):
    return json.loads((output / f"methods/{name}/seed-1/evaluation.json").read_text())


def test_sources_that_are_not_there_are_said(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        PAPER["main"](["--data", str(tmp_path), "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and "has no chat/train.jsonl" in capsys.readouterr().err


def test_the_tables_have_the_papers_columns_where_tasks_were_asked():
    metric = {"mean": 30.775, "sd": None}
    variants = [
        {"name": name, "metrics": {"mean_loss": metric, "task/MMLU": metric, "task/average": metric}}
        for name in ("uniform", "dynamic", "inverse")
    ]
    text = PAPER["layout"]({"variants": variants}, ["5"])
    assert "| | MMLU | average |" in text
    assert [line for line in text.splitlines() if line.startswith("| ")][1:] == [
        "| Uniform | 30.77 | 30.77 |",
        "| Dynamic | 30.77 | 30.77 |",
        "| Inverse | 30.77 | 30.77 |",
    ]
