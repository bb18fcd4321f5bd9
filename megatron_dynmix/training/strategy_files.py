"""What strategies are given by file or by source name: reference losses, another run's weights, embeddings.

Everything is turned into plain lists in the order of the sources, so that the ledger can hold it. Axes:
D sources, V dimensions of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dynmix.config.strategies import RESOLVED
from megatron_dynmix.config.tree import MixingConfig
from megatron_dynmix.data.prepare.jsonl import read_json
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.weights import normalise_weights
from megatron_dynmix.records.jsonl import read_records


def resolve_files(mixing: MixingConfig, sources: Sequence[str]) -> dict[str, Any]:
    """Option of a strategy -> its value, for every setting of `RESOLVED` that is given.

    Args:
        mixing: the settings.
        sources: names, in the order of their dataset_id.

    Raises:
        InputError: a file that cannot be read, does not match the sources, or holds what is no such value.

    """
    readers = {
        "reference": read_losses,
        "target": read_losses,
        "weights_from": last_weights,
        "embeddings": read_embeddings,
    }
    resolved: dict[str, Any] = {
        RESOLVED[setting]: read(Path(getattr(mixing, setting)), sources)
        for setting, read in readers.items()
        if getattr(mixing, setting) is not None
    }
    if mixing.schedule is not None:
        resolved[RESOLVED["schedule"]] = plan(mixing.schedule, sources)
    return resolved


def read_losses(path: Path, sources: Sequence[str]) -> list[float]:
    """Losses of all sources in nats from a JSON file {source: loss}, or a run's ``evaluation.json``."""
    content = read_json(path)
    if isinstance(content, dict) and "iteration" in content and isinstance(content.get("sources"), dict):
        content = {name: measured.get("loss") for name, measured in content["sources"].items()}
    content = _by_source(path, content, sources)
    for name, loss in content.items():
        good = isinstance(loss, int | float) and not isinstance(loss, bool) and math.isfinite(loss)
        if not good or loss < 0:
            raise InputError(
                f"{path}: the loss of source {name} is {loss!r}; it must be a finite number of nats, 0 "
                "or more"
            )
    return [float(content[name]) for name in sources]


def last_weights(run_dir: Path, sources: Sequence[str]) -> list[float]:
    """The weights that another run ended with, by the names of its sources."""
    path = run_dir / "mixing.jsonl"
    if not path.is_file():
        raise InputError(f"{run_dir} holds no mixing.jsonl; give the --run-dir of a run")
    records = read_records(path)
    if not records:
        raise InputError(
            f"{path} holds no weight update, so the run ended with the weights it began with; give those as "
            "weights of data.sources, with strategy fixed"
        )
    try:
        weights = dict(zip(records[-1]["sources"], records[-1]["new_weights"], strict=True))
        return normalise_weights(_by_source(path, weights, sources), sources).tolist()
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: its last weights cannot be used: {error}") from None


def read_embeddings(path: Path, sources: Sequence[str]) -> list[list[float]]:
    """One vector per source, from a JSON file {source: [number, ...]} or an .npz of one array per source."""
    content = _by_source(path, _read_npz(path) if path.suffix == ".npz" else read_json(path), sources)
    vectors = []
    for name in sources:
        try:
            vector_V = np.array(content[name], dtype=np.float64)
        except (TypeError, ValueError):
            raise InputError(
                f"{path}: the embedding of source {name} is no list of numbers; give one vector per source"
            ) from None
        if vector_V.ndim != 1 or not vector_V.size or not np.isfinite(vector_V).all():
            raise InputError(
                f"{path}: the embedding of source {name} has shape {vector_V.shape}, or holds what is not "
                "finite; give one vector of finite numbers per source"
            )
        vectors.append(vector_V.tolist())
    if len({len(vector) for vector in vectors}) > 1:
        lengths = {name: len(vector) for name, vector in zip(sources, vectors, strict=True)}
        raise InputError(f"{path}: the embeddings have different lengths: {lengths}; use one encoder for all")
    return vectors


def plan(points: Sequence[Any], sources: Sequence[str]) -> list[list[Any]]:
    """`[[iteration, {source: weight}], ...]` with the weights in the order of the sources."""
    resolved = []
    for point in points:
        if (
            not isinstance(point, list | tuple)
            or len(point) != 2
            or not isinstance(point[0], int)
            or not isinstance(point[1], Mapping)
        ):
            raise InputError(
                f"mixing.schedule holds {point!r}; give [[iteration, {{source: weight, ...}}], ...]"
            )
        try:
            weights_D = normalise_weights(point[1], sources)
        except (TypeError, ValueError) as error:
            raise InputError(f"mixing.schedule at iteration {point[0]}: {error}") from None
        resolved.append([point[0], weights_D.tolist()])
    return resolved


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except Exception as error:  # of zipfile, zlib or NumPy, whatever is broken
        raise InputError(f"{path} cannot be read as an .npz file: {error}") from None


def _by_source(path: Path, content: Any, sources: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds {type(content).__name__}; it must hold an object {{source: value}}")
    missing = [name for name in sources if name not in content]
    unknown = [name for name in content if name not in sources]
    if missing or unknown:
        raise InputError(
            f"{path} does not match the sources: missing {', '.join(missing) or 'none'}, unknown "
            f"{', '.join(unknown) or 'none'}; give one value for each of {', '.join(sources)}"
        )
    return dict(content)
