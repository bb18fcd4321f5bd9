"""What is compared: variants of one run, each a name and the settings that it changes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dynmix.compare.benchmarks import Benchmarks
from megatron_dynmix.config import leaves
from megatron_dynmix.config.load import read_mapping
from megatron_dynmix.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]*")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What all cells of a comparison share."""

    run_yaml: Path
    output: Path
    flags: tuple[str, ...]
    """Flags of the command line, for every cell; a variant's own settings win over them."""
    nproc: int
    """Ranks of each cell."""
    benchmarks: Benchmarks | None = None
    """What every cell is asked beside its held-out rows."""


@dataclass(frozen=True)
class Variant:
    """One row of the comparison."""

    name: str
    """Also the name of its folder."""
    settings: tuple[tuple[str, str], ...]
    """Setting and value as flags have them; `{seed}` in a value stands for the seed of the run."""

    def flags(self, seed: int | None = None) -> list[str]:
        """Return the flags of `train` for one seed; without one, those of its settings as they are."""
        settings = [*self.settings, *([] if seed is None else [("seed", str(seed))])]
        return [
            f"--{name.replace('_', '-')}={value if seed is None else value.replace('{seed}', str(seed))}"
            for name, value in settings
        ]


def variants_of(grids: Sequence[Path], strategies: str | None) -> list[Variant]:
    """Read what `--grid` and `--strategies` give.

    Raises:
        InputError: nothing was given, or something that cannot be used.

    """
    variants = [variant for path in grids for variant in variants_from_file(path)]
    if strategies is not None:
        variants += variants_from_text(strategies)
    if not variants:
        raise InputError("nothing to compare; give --strategies a,b,c or --grid FILE.yaml")
    check_distinct(variants)
    return variants


def variants_from_text(text: str) -> list[Variant]:
    """Read `--strategies`: names of strategies, each with options after a colon.

    `uniform,gate-load:signal=train,interval=50` are two: what holds a `=` belongs to the name before it.

    Raises:
        InputError: an empty item, an option without a strategy, or a setting that there is not.

    """
    items: list[tuple[str, dict[str, str]]] = []
    for part in text.split(","):
        head, equals, value = part.partition("=")
        strategy, colon, option = head.rpartition(":") if equals else (head, "", "")
        if equals and colon:
            items.append((strategy.strip(), {option.strip(): value.strip()}))
        elif equals and items:
            items[-1][1][head.strip()] = value.strip()
        elif equals or not head.strip():
            raise InputError(
                f"--strategies {text}: {part!r} belongs to no strategy; write "
                "NAME,NAME:option=value,option=value"
            )
        else:
            items.append((head.strip(), {}))
    variants = []
    for strategy, options in items:
        name = ",".join([strategy, *(f"{key}={value}" for key, value in options.items())])
        name = re.sub(r"[^A-Za-z0-9_.=-]+", "_", name)
        variants.append(_variant(name, {"strategy": strategy, **options}, "--strategies"))
    return variants


def variants_from_file(path: Path) -> list[Variant]:
    """Read a grid: a YAML mapping `{name: {setting: value}}`."""
    content = read_mapping(path, "variants by name, as `uniform: {strategy: uniform}`")
    variants = []
    for name, settings in content.items():
        if not isinstance(settings, dict):
            raise InputError(
                f"{path}: {name} holds {settings!r}; it must hold settings: {{strategy: uniform}}"
            )
        variants.append(_variant(name, settings, str(path)))
    return variants


def _variant(name: Any, settings: dict[str, Any], where: str) -> Variant:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            f"{where}: {name!r} cannot be a folder's name; use letters, digits and _ . = - only, in quotes "
            "where YAML would read a number"
        )
    for setting in settings:
        if setting == "seed":
            raise InputError(f"{where}: {name} sets seed, which is given by --seeds; leave it out")
        try:
            leaves.find(str(setting))
        except InputError as error:
            raise InputError(f"{where}: {name}: {error}") from None
    # JSON is YAML, which is what flags are read as
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return Variant(name, tuple(texts.items()))


def check_distinct(variants: Sequence[Variant]) -> None:
    """Refuse two variants of one name."""
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"the variant {name} is given twice; give each a name of its own in a --grid file"
            )


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `--seeds`: whole numbers with commas between, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"--seeds is {text!r}; give whole numbers with commas between, as 1,2,3")
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds is {text!r}, which holds a seed twice; give each once")
    return seeds
