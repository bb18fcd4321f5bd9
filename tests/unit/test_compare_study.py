"""The study's own files: every variant is a configuration that works, and the control is what it says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from megatron_dynmix.compare.grid import variants_from_file
from megatron_dynmix.config.check import check_settings
from megatron_dynmix.config.load import load_config
from megatron_dynmix.mixing.strategies import build_strategy
from megatron_dynmix.mixing.strategies.gate_load import GateLoad
from megatron_dynmix.mixing.strategies.uniqueness import Uniqueness
from megatron_dynmix.mixing.strategy import Signal

STUDY = Path(__file__).parents[2] / "examples/study"


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.setenv("WORK", str(tmp_path / "work"))
    monkeypatch.syspath_prepend(str(STUDY))


def load(name):
    spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("grid", ["GRID.yaml", "SWEEPS.yaml", "COPIES.yaml", "REDUNDANCY.yaml", "FEW.yaml"])
def test_every_variant_is_a_configuration(grid):
    variants = variants_from_file(STUDY / grid)
    assert variants[0].name == "uniform"
    for variant in variants:
        config = load_config(STUDY / "RUN.yaml", variant.flags(1))
        assert config.mixing.strategy == dict(variant.settings)["strategy"]


@pytest.mark.parametrize("grid", ["SWEEPS.yaml", "COPIES.yaml"])
def test_a_sweep_changes_what_its_name_says(grid):
    for variant in variants_from_file(STUDY / grid):
        strategy, _, changed = variant.name.partition(".")
        setting, equals, value = changed.partition("=")
        assert dict(variant.settings)["strategy"] == strategy
        assert not equals or dict(variant.settings)[setting] == value


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_sizes_fit_the_model(size):
    study = load("study")
    shape = study.LARGE if size == "gpu" else []
    config = load_config(STUDY / "RUN.yaml", [*shape, *study.SIZES[size]])
    pretraining = load_config(STUDY / "PRETRAIN.yaml", [*shape, *study.SIZES[size]])
    assert list(config.data.sources) == list(study.SOURCES)
    assert pretraining.model == config.model and pretraining.data.seq_length == config.data.seq_length


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_parts_of_other_shapes_and_lengths_are_configurations(size):
    module = load("study")
    for part, flags in module.SHAPES.items():
        config = load_config(STUDY / "RUN.yaml", [*module.SIZES[size], *flags])
        check_settings(config, 1)
        setting, _, number = part.partition("-")
        field = {"experts": "num_moe_experts", "top": "moe_router_topk"}[setting]
        assert config.model.megatron[field] == int(number)
        assert number != "1" or config.model.megatron["moe_router_pre_softmax"], "Megatron-Core asks for it"
    asked = SimpleNamespace(output=STUDY, data=STUDY, seeds="1", jobs=1, size=size)
    study = module.Study(asked, ["--lr", "1e-3"])
    usual = load_config(STUDY / "RUN.yaml", module.SIZES[size])
    for part, times in module.BUDGETS.items():
        config = load_config(STUDY / "RUN.yaml", [*module.SIZES[size], *study.length(part)])
        check_settings(config, 1)
        assert config.training.train_iters == times * usual.training.train_iters
        assert config.training.train_iters >= 5 * config.mixing.interval
    assert {module.PARTS[part] for part in (*module.SHAPES, *module.BUDGETS)} == {"FEW.yaml"}


def test_parts_of_other_shapes_are_refused_without_random_weights(tmp_path):
    command = [sys.executable, STUDY / "study.py", "--data", tmp_path, "--output", tmp_path / "out"]
    done = subprocess.run(
        [*command, "--parts", "experts-4", "--starts", "pretrained"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "add random to --starts" in done.stderr


PARTIAL = {"layers": "last", "min_gap": 0, "alike_from": 0}


@pytest.mark.parametrize(
    ("rule", "control"),
    [(GateLoad(), "ShuffledDelta"), (Uniqueness(**PARTIAL), "ShuffledUniqueness")],
)
def test_a_control_moves_as_far_to_the_wrong_sources(rule, control):
    counts_DLE = np.random.default_rng(1).integers(1, 100, (4, 2, 8))
    weights_D = np.full(4, 0.25)
    signal = Signal(counts_DLE=counts_DLE, seed=3)
    right = rule.propose(weights_D, signal, {})
    control = build_strategy(f"shuffled:{control}", {} if control == "ShuffledDelta" else PARTIAL)
    wrong = control.propose(weights_D, signal, {})
    np.testing.assert_array_equal(np.sort(wrong.delta_D), np.sort(right.delta_D))
    assert not np.any(wrong.delta_D == right.delta_D)
    np.testing.assert_allclose(np.sort(wrong.weights_D), np.sort(right.weights_D), rtol=1e-12)
    np.testing.assert_array_equal(control.propose(weights_D, signal, {}).weights_D, wrong.weights_D)


def row(number, origin, answer):
    turns = [{"from": "human", "value": f"question {number}"}, {"from": "gpt", "value": answer}]
    return {"id": f"{origin}:{number}", "conversations": turns}


@pytest.fixture
def data(tmp_path):
    """A source `math` of two datasets, one of them with too few held-out rows."""
    folder = tmp_path / "data/math"
    folder.mkdir(parents=True)
    for split, rows in (("train", 100), ("dev", 40)):
        lines = [row(n, "large" if n % 10 else "small", "x" * n) for n in range(rows)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def texts(path):
    return [json.loads(line)["conversations"][0]["value"] for line in Path(path).read_text().splitlines()]


def test_pieces_of_a_source_are_what_they_are_called(data, tmp_path):
    pieces = load("pieces")
    every = texts(data / "math/train.jsonl")
    halves = pieces.halves(data, "math", tmp_path / "pieces")
    first, second = (texts(half["path"]) for half in halves.values())
    assert sorted(first + second) == sorted(every) and abs(len(first) - len(second)) < 40
    assert {half["probe"] for half in halves.values()} == {f"{data}/math/dev.jsonl"}
    (filtered,) = pieces.filtered(data, "math", tmp_path / "pieces").values()
    assert texts(filtered["path"]) == [f"question {n}" for n in range(51, 100)]
    ((name, large),) = pieces.datasets(data, "math", tmp_path / "pieces").items()
    assert name == "math-large" and len(texts(large["path"])) == 90 and len(texts(large["probe"])) == 36


def test_copies_count_once_in_the_tables():
    tables = load("tables")
    cells = []
    for variant, gain in (("uniform", 0.0), ("other", 0.5)):
        for seed in (1, 2):
            losses = {"loss/chat": 4.0 + seed - gain, "loss/math": 2.0 + gain, "loss/math-2": 2.0 + gain}
            weights = [[0, [0.5, 0.25, 0.25]]]
            cells.append({"variant": variant, "seed": seed, "metrics": losses, "weights": weights})
    _, _, uniform, other = tables.table({"cells": cells, "sources": ["chat", "math", "math-2"]}, by_kind=True)
    assert "| 3.7500 ± 0.3536 | - |" in uniform and uniform.endswith("chat 0.500, math 0.250, math-2 0.250 |")
    assert "| 3.7500 ± 0.3536 | +0.0000 [+0.0000, +0.0000] |" in other
    assert "**-0.5000 [-0.5000, -0.5000]**" in other


def test_sweeps_say_how_weights_moved(tmp_path):
    tables = load("tables")
    cell = {"variant": "uniform", "seed": 1, "metrics": {"loss/chat": 4.0}, "weights": [[0, [1.0]]]}
    moved = {
        "settled": {"mean": 146.7},
        "turns": {"mean": 8.67},
        "path": {"mean": 0.513},
        "net": {"mean": 0.1},
    }
    found = {"cells": [cell], "sources": ["chat"], "variants": [{"name": "uniform", "motion": moved}]}
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(found))
    assert tables.part("sweeps-twice", {"pretrained": path}).endswith("| chat 1.000 | 147 | 8.7 | 0.51 |")
    assert tables.part("twice", {"pretrained": path}).endswith("| chat 1.000 |")


def test_the_corpus_is_plain_text_and_written_once(data, tmp_path, monkeypatch):
    corpus = load("corpus")
    monkeypatch.setattr(corpus, "PACKAGES", ("yaml",))
    monkeypatch.setattr(corpus, "LEAST_CHARACTERS", 20)
    corpus.write_corpus(data, ["math"], tmp_path / "corpus")
    rows = [json.loads(line) for line in (tmp_path / "corpus/math.jsonl").read_text().splitlines()]
    assert rows[3] == {"text": "question 3\n\nxxx"}
    written = [
        json.loads(line)["text"] for line in (tmp_path / "corpus/docstrings.jsonl").read_text().splitlines()
    ]
    assert yaml.safe_load.__doc__.split("\n")[1].strip() in "".join(written) and len(set(written)) == len(
        written
    )
    before = (tmp_path / "corpus/math.jsonl").stat().st_mtime_ns
    corpus.write_corpus(data, ["math"], tmp_path / "corpus")
    assert (tmp_path / "corpus/math.jsonl").stat().st_mtime_ns == before


def test_data_that_is_not_there_is_said(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, STUDY / "study.py", "--data", tmp_path, "--output", tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "has no chat/train.jsonl" in done.stderr
    assert not (tmp_path / "out").exists()


def test_run_yaml_names_only_the_folders_it_is_given():
    text = (STUDY / "RUN.yaml").read_text()
    paths = [source["path"] for source in yaml.safe_load(text)["data"]["sources"].values()]
    assert all(path.startswith("${DATA}/") for path in paths)
