"""What the tests of the configuration share: a RUN.yaml that works, in a folder of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import load_config

Settings = dict[str, dict[str, Any]]


def good_settings(folder: Path) -> Settings:
    """Three sources with probes, and every file they name."""
    (folder / "tokenizer").mkdir(exist_ok=True)
    sources = {}
    for name in ("chat", "math", "code"):
        for file in (f"{name}.jsonl", f"{name}.probe.jsonl"):
            (folder / file).touch()
        sources[name] = {"path": f"{name}.jsonl", "probe": f"{name}.probe.jsonl"}
    return {
        "model": {"preset": "tiny"},
        "parallel": {"expert_model_parallel_size": 2},
        "data": {"tokenizer": "tokenizer", "seq_length": 64, "sources": sources},
        "mixing": {"strategy": "gate-load", "interval": 10, "signal": "probe"},
        "training": {"train_iters": 20, "micro_batch_size": 2, "global_batch_size": 8},
    }


def write(folder: Path, content: Settings | str) -> Path:
    path = folder / "RUN.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def load(folder: Path, content: Settings | str, flags: Sequence[str] = ()) -> RunConfig:
    return load_config(write(folder, content), flags)
