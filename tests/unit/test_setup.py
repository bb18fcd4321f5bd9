"""A start of `train` makes everything once: whatever the strategy, nothing is read, packed or built again."""

import json
from collections import Counter
from pathlib import Path

import pytest
from config_fixtures import good_settings, write
from data_fixtures import (  # noqa: F401
    tokenizer_dir_fixture,
    tokenizer_fixture,
    varied_rows,
    write_jsonl,
)

from megatron_dynmix import platform
from megatron_dynmix.cli import main

platform.start()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_dynmix.config import load as config_load  # noqa: E402
from megatron_dynmix.data.packed import PackedSource  # noqa: E402
from megatron_dynmix.job import launch  # noqa: E402
from megatron_dynmix.mixing.controller import MixingController  # noqa: E402
from megatron_dynmix.training import mix_setup, run, setup  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
NAMES = ("chat", "math", "code")
LOSSES = dict.fromkeys(NAMES, 2.0)
VECTORS = {"chat": [1, 0], "math": [0, 1], "code": [1, 1]}
READERS = ("read_losses", "other_weights", "read_embeddings")


class Built(Exception):
    """Everything is set up: the model would be built now."""


@pytest.fixture
def calls(monkeypatch):
    """How often each thing was made; the run ends where its trainer is complete."""
    counted = Counter()

    def count(owner, name, key):
        made = getattr(owner, name)

        def counting(*args, **kwargs):
            counted[key(args, kwargs)] += 1
            return made(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(config_load, "load_config", lambda args, kwargs: "config")
    count(setup, "load_tokenizer", lambda args, kwargs: "tokenizer")
    count(PackedSource, "__init__", lambda args, kwargs: f"packing of {kwargs['name']}")
    count(MixingController, "__init__", lambda args, kwargs: "controller")
    count(MixingController, "start", lambda args, kwargs: "first weights")
    for reader in READERS:
        count(mix_setup, reader, lambda args, kwargs: f"file {Path(args[0]).name}")
    yield counted
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture
def run_yaml(tmp_path, tokenizer_dir):
    """A one-rank run of three small sources with held-out rows; settings of the mix are added to it."""

    def make(**mixing):
        content = good_settings(tmp_path)
        content["parallel"] = {}
        content["data"] |= {"tokenizer": str(tokenizer_dir), "template": "vicuna", "overlong": "truncate"}
        content["mixing"] |= mixing
        for seed, name in enumerate(NAMES):
            write_jsonl(tmp_path / f"{name}.jsonl", varied_rows(30, seed))
            write_jsonl(tmp_path / f"{name}.probe.jsonl", varied_rows(8, 10 + seed))
        return write(tmp_path, content)

    return make


@pytest.mark.parametrize(
    "mixing, files",
    [
        ({"strategy": "gate-load", "signal": "probe"}, {}),
        ({"strategy": "gate-load", "unit": "examples", "prior": "size", "prior_pull": 0.1}, {}),
        ({"strategy": "ref-loss", "reference": "losses.json"}, {"losses.json": LOSSES}),
        ({"strategy": "schedule", "schedule": [[0, LOSSES]]}, {}),
        ({"strategy": "sent-emb", "embeddings": "vectors.json"}, {"vectors.json": VECTORS}),
        (
            {
                "strategy": "sheared",
                "target": "losses.json",
                "shadow": ["gate-load", "odm"],
            },
            {"losses.json": LOSSES},
        ),
    ],
    ids=["gate-load", "examples", "ref-loss", "schedule", "sent-emb", "shadows"],
)
def test_everything_is_made_once(tmp_path, run_yaml, calls, monkeypatch, mixing, files):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    path = run_yaml(**mixing)

    def build_model(*args):
        raise Built

    monkeypatch.setattr(run, "build_model", build_model)
    with pytest.raises(Built):
        main(["train", str(path), "--run-dir", str(tmp_path / "run")])
    probed = (
        [f"{name} (probe)" for name in NAMES] if mixing["strategy"] not in ("schedule", "sent-emb") else []
    )
    once = ["config", "tokenizer", "controller", "first weights", *(f"file {name}" for name in files)]
    assert calls == Counter([*once, *(f"packing of {name}" for name in [*NAMES, *probed])])


def test_the_launcher_of_ranks_makes_everything_once_too(tmp_path, run_yaml, calls, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "launch_ranks", lambda command, ranks: started.append((command, ranks)) or 0)
    assert main(["train", str(run_yaml()), "--run-dir", str(tmp_path / "run"), "--nproc-per-node", "2"]) == 0
    ((command, ranks),) = started
    assert ranks == 2 and "train" in command
    assert set(calls.values()) == {1} and calls["controller"] == 1
