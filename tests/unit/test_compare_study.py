"""The study's own files: every variant is a configuration that works, and the control is what it says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_dynmix.compare.grid import variants_from_file
from megatron_dynmix.config.load import load_config
from megatron_dynmix.mixing.strategies import build_strategy
from megatron_dynmix.mixing.strategies.gate_load import GateLoad
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


@pytest.mark.parametrize("grid", ["GRID.yaml", "SWEEPS.yaml", "REDUNDANCY.yaml"])
def test_every_variant_is_a_configuration(grid):
    variants = variants_from_file(STUDY / grid)
    assert variants[0].name == "uniform"
    for variant in variants:
        config = load_config(STUDY / "RUN.yaml", variant.flags(1))
        assert config.mixing.strategy == dict(variant.settings)["strategy"]


def test_a_sweep_changes_what_its_name_says():
    for variant in variants_from_file(STUDY / "SWEEPS.yaml"):
        setting, equals, value = variant.name.partition("=")
        if equals and value != "first":
            assert dict(variant.settings)[setting] == value


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_sizes_fit_the_model_and_the_sequential_schedule(size):
    study = load("study")
    config = load_config(STUDY / "RUN.yaml", study.SIZES[size])
    assert config.training.train_iters == study.PHASE[size] * len(study.SOURCES)
    assert list(config.data.sources) == list(study.SOURCES)


def test_the_control_moves_as_far_to_the_wrong_sources():
    counts_DLE = np.random.default_rng(1).integers(1, 100, (4, 2, 8))
    weights_D = np.full(4, 0.25)
    signal = Signal(counts_DLE=counts_DLE, seed=3)
    right = GateLoad().propose(weights_D, signal, {})
    control = build_strategy("shuffled_delta:ShuffledDelta", {})
    wrong = control.propose(weights_D, signal, {})
    np.testing.assert_array_equal(np.sort(wrong.delta_D), np.sort(right.delta_D))
    assert not np.any(wrong.delta_D == right.delta_D)
    np.testing.assert_allclose(np.sort(wrong.weights_D), np.sort(right.weights_D), rtol=1e-12)
    np.testing.assert_array_equal(control.propose(weights_D, signal, {}).weights_D, wrong.weights_D)


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


def test_the_page_holds_every_grid(tmp_path):
    for name in ("methods", "sweeps"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.md").write_text(
            "# T\n\n## Held-out loss\n\nCharts: [comparison.html](comparison.html)\n"
        )
    page = load("study").page([tmp_path / "methods", tmp_path / "sweeps"])
    assert page.startswith("# Study\n\n## Methods\n\n### Held-out loss")
    assert "[comparison.html](sweeps/comparison.html)" in page


def test_run_yaml_names_only_the_folders_it_is_given():
    text = (STUDY / "RUN.yaml").read_text()
    paths = [source["path"] for source in yaml.safe_load(text)["data"]["sources"].values()]
    assert all(path.startswith("${DATA}/") for path in paths)
