"""What `--data-path` says of the sources: names and first weights; and the train split as one dataset each.

Axes: D sources.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dynmix.config.load import check_name
from megatron_dynmix.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The sources of one split."""

    prefixes: list[str]
    names: list[str]
    weights: list[float] | None
    """None: in proportion to their sizes, as stock has it."""

    def first_weights(self, sizes: Sequence[int]) -> dict[str, float]:
        """Return the weights that stock would draw with."""
        return dict(zip(self.names, self.weights or map(float, sizes), strict=True))


def blends_of(args: Namespace) -> tuple[Blend, Blend | None]:
    """Return the blends of train and validation; `InputError` if there are none."""
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, per_split = get_blend_and_blend_per_split(args)
    train, valid = (blend, blend) if blend else (per_split or [None, None])[:2]
    if not train or not train[0]:
        raise InputError("there is no training data to mix; give --data-path or --train-data-path")
    known = _blend(train, args.dynmix_names, "--data-path")
    return known, valid and (known if valid is train else _blend(valid, None, "--valid-data-path"))


def _blend(said: tuple[list[str], list[float] | None], names: list[str] | None, flag: str) -> Blend:
    prefixes, weights = list(said[0]), said[1]
    if names is None:
        names = names_of(prefixes)
    elif len(names) != len(prefixes):
        raise InputError(
            f"--dynmix-names gives {len(names)} names ({', '.join(names)}), but {flag} holds {len(prefixes)} "
            "sources; give one name for each, in their order"
        )
    for number, name in enumerate(names):
        check_name(name, "--dynmix-names", names[:number])
    return Blend(prefixes=prefixes, names=names, weights=None if weights is None else list(weights))


def names_of(prefixes: Sequence[str]) -> list[str]:
    """Return the last part of each path, or as many of the last parts as tell them apart."""
    parts = [Path(prefix).parts for prefix in prefixes]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [".".join(part.strip(os.sep) for part in path[-depth:]).strip(".") for path in parts]
        if len(set(names)) == len(names):
            return names
    (twice, _), *_ = Counter(prefixes).most_common(1)
    raise InputError(f"--data-path holds {twice} twice; give it once, with the sum of its weights")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The train split as the datasets of its sources, one epoch each."""

    datasets: list[Any]
    """None, each of them, on ranks that have no use for rows."""
    loaded: bool
    """Whether stock's code on this rank asks for batches."""


def train_and_rest(stock: Callable[..., Any], builder: Any, rows: type | None) -> list[Any]:
    """Build the train split source by source, one epoch each, and leave the other splits to stock.

    Stock's own datasets of a blend are as long as their first weights call for. `rows` is a class in the
    place of the script's, whose datasets all ranks have.
    """
    config, loaded = builder.config, builder.is_built_on_rank()
    if rows is not None:
        builder.cls, builder.is_built_on_rank = rows, lambda: True
    prefixes = (config.blend or config.blend_per_split[0])[0]
    split = [config.split_matrix[0] if config.blend else (0.0, 1.0), None, None]
    parts = builder._build_megatron_datasets_parallel(prefixes, split, [[None] * 3 for _ in prefixes])[0]
    name = "split_matrix" if config.blend else "blend_per_split"
    whole = getattr(config, name)
    setattr(config, name, [None, *whole[1:]])
    _, valid, test = stock(builder)
    setattr(config, name, whole)
    return [Sources(datasets=list(parts), loaded=loaded), valid, test]


def prints_of(blend: Blend, args: Namespace) -> dict[str, list[str]]:
    """Return what the rows of each source follow from, as far as the sizes of its files tell."""
    shape = [f"seq_length {args.seq_length}", f"split {args.split}"]
    return {
        name: [*(f"{kind} {_size(f'{prefix}.{kind}')}" for kind in ("bin", "idx")), *shape]
        for name, prefix in zip(blend.names, blend.prefixes, strict=True)
    }


def _size(path: str) -> int | str:
    return os.path.getsize(path) if os.path.exists(path) else "elsewhere"  # an object store
