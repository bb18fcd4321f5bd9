"""What the tests of `data/` share: a tiny tokenizer, rows, files and a prepared source."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dynmix.data.prepare.prepare import prepare_source
from megatron_dynmix.data.prepare.template import Renderer, TrainOn
from megatron_dynmix.data.prepared import Recipe, SourceReport
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.fast import train_bpe
from megatron_dynmix.data.tokenizer.load import load_tokenizer

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.",
    "USER: hello there ASSISTANT: good day",
    "System: be brief User: what is two plus two Assistant: two plus two is four",
] * 4


@pytest.fixture(scope="session", name="tokenizer_dir")
def tokenizer_dir_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 400, folder)
    return folder


@pytest.fixture(scope="session", name="tokenizer")
def tokenizer_fixture(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


def sharegpt(*texts: str, **extra: Any) -> dict[str, Any]:
    """A row of human and gpt turns by turns."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **extra}


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prepare(folder: Path, rows: Sequence[Any], tokenizer: Tokenizer, **options: Any) -> SourceReport:
    """Prepare rows as the source `folder/source`."""
    path = write_jsonl(folder / "rows.jsonl", rows)
    settings: dict[str, Any] = {"name": "toy", "inputs": [path], "prefix": folder / "source"}
    return prepare_files(**settings | {"tokenizer": tokenizer} | options)


def prepare_files(
    *, tokenizer: Tokenizer, template: str = "vicuna", train_on: TrainOn = "all", **options: Any
) -> SourceReport:
    """`prepare_source` with what a renderer and a recipe are made of."""
    renderer = Renderer(tokenizer, template, train_on)
    said = {
        name: options.pop(name)
        for name in ("format", "fields", "split_length", "held_out")
        if name in options
    }
    recipe = Recipe(tokenizer=tokenizer.fingerprint, template=renderer.fingerprint, **said)
    return prepare_source(renderer=renderer, recipe=recipe, **options)


def varied_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Distinct one- to three-round conversations of varied length."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        texts = []
        for _ in range(int(rng.integers(1, 4))):
            texts += ["what is " * int(rng.integers(1, 6)) + str(number), "four " * int(rng.integers(1, 20))]
        rows.append(sharegpt(*texts))
    return rows
