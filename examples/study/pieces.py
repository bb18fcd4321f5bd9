"""Sources made of other sources: halves, near copies, and the datasets that a source was collected from."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEAST_HELD_OUT = 30
"""Held-out rows that a dataset must have to be a source of its own."""

Row = dict[str, Any]
Sources = dict[str, dict[str, str]]
"""Name -> {path, probe}, as RUN.yaml has them."""


def as_it_is(data: Path, name: str) -> dict[str, str]:
    """Return a source of the data folder."""
    return {"path": f"{data}/{name}/train.jsonl", "probe": f"{data}/{name}/dev.jsonl"}


def halves(data: Path, name: str, folder: Path) -> Sources:
    """Split a source into two of one distribution, by the digests of its rows; one test for both."""
    pieces = {}
    for half in (0, 1):
        path = _written(
            folder / f"{name}-half-{half + 1}.jsonl", data / name, lambda row, h=half: _digest(row) % 2 == h
        )
        pieces[f"{name}-half-{half + 1}"] = {**as_it_is(data, name), "path": str(path)}
    return pieces


def filtered(data: Path, name: str, folder: Path) -> Sources:
    """Return what a filter leaves of a source: the rows with a longer answer than every other one has."""
    lengths = sorted(len(row["conversations"][-1]["value"]) for row in _rows(data / name / "train.jsonl"))
    middle = lengths[len(lengths) // 2]
    path = _written(
        folder / f"{name}-filtered.jsonl",
        data / name,
        lambda row: len(row["conversations"][-1]["value"]) > middle,
    )
    return {f"{name}-filtered": {**as_it_is(data, name), "path": str(path)}}


def datasets(data: Path, name: str, folder: Path) -> Sources:
    """Return the datasets that a source was collected from, by the prefix of each row's id; no small ones."""
    held_out: dict[str, int] = {}
    for row in _rows(data / name / "dev.jsonl"):
        held_out[_origin(row)] = held_out.get(_origin(row), 0) + 1
    pieces: Sources = {}
    for origin in sorted(key for key, rows in held_out.items() if rows >= LEAST_HELD_OUT):
        paths = {}
        for key, split in (("path", "train"), ("probe", "dev")):
            target = folder / f"{name}-{origin}.{split}.jsonl"
            paths[key] = str(_written(target, data / name, lambda row, o=origin: _origin(row) == o, split))
        pieces[f"{name}-{origin}"] = paths
    return pieces


def _origin(row: Row) -> str:
    return str(row["id"]).partition(":")[0]


def _digest(row: Row) -> int:
    return zlib.crc32(json.dumps(row["conversations"]).encode())


def _rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def _written(target: Path, source: Path, keep: Callable[[Row], bool], split: str = "train") -> Path:
    """Write the rows that are kept, whole or not at all; what is there stays."""
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(".part")
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows(source / f"{split}.jsonl") if keep(row))
        draft.replace(target)
    return target
