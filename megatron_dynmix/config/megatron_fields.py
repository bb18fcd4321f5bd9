"""The fields of Megatron-Core's own configuration, known without importing it or torch.

`tools/megatron_fields.py` writes `megatron_fields.json` from the oldest supported release, and
`megatron_versions.json` from each later one. What can be set are the fields that the oldest one has and the
installed one still has: a later field is none that runs of this package were seen to work with.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError

SECTIONS = {
    "ModelParallelConfig": "parallel",
    "DistributedDataParallelConfig": "parallel",
    "TransformerConfig": "model",
    "MLATransformerConfig": "model",
    "OptimizerConfig": "optimizer",
}
"""Megatron-Core's dataclasses, and the section that their fields are given in."""
OLDEST = "0.16"
"""The release whose fields can be set."""
WORKS_FROM = {"fp32_residual_connection": ("0.17", "rounds the residual after every addition all the same")}
"""Fields that do nothing before a release, and what Megatron-Core does there."""


@dataclass(frozen=True)
class MegatronField:
    """One field of a dataclass of Megatron-Core."""

    hint: Any
    """Its type; an enumeration is a Literal of its names."""
    default: Any


@functools.cache
def megatron_fields() -> dict[str, dict[str, MegatronField]]:
    """Return name -> field for each of Megatron-Core's dataclasses, without the fields it inherits."""
    path = Path(__file__).with_suffix(".json")
    fields = {}
    for owner, rows in json.loads(path.read_text(encoding="utf-8")).items():
        types = type(owner, (), {"__annotations__": {name: kind for name, (kind, _) in rows.items()}})
        hints = typing.get_type_hints(types, {"Any": Any, "Literal": Literal})
        fields[owner] = {name: MegatronField(hints[name], default) for name, (_, default) in rows.items()}
    return fields


def installed() -> tuple[str, str]:
    """Return the release of Megatron-Core, such as 0.16, and its version; those tried if there is none."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return OLDEST, OLDEST
    return ".".join(version.split(".")[:2]), version


def _differences() -> dict[str, dict[str, list[str]]]:
    """Return release -> kind of difference from the oldest one -> fields."""
    path = Path(__file__).with_name("megatron_versions.json")
    found: dict[str, dict[str, list[str]]] = json.loads(path.read_text(encoding="utf-8"))
    return found


@functools.cache
def changed_fields() -> frozenset[str]:
    """Return the fields whose type or default is another one in the installed release than in the oldest."""
    return frozenset(_differences().get(installed()[0], {}).get("changed", ()))


@functools.cache
def unavailable_fields() -> dict[str, str]:
    """Return the fields that cannot be set since another release than the installed one has them, and why."""
    differences = _differences()
    release, version = installed()
    if release not in (OLDEST, *differences):
        raise InputError(
            f"megatron-core {version} is installed, and what it does is not known here; install one from "
            f"{OLDEST}.1 to {max(differences)}"
        )
    reasons = {}
    for later, fields in reversed(differences.items()):
        for name in fields["new"]:
            reasons[name] = f"it came with megatron-core {later}, and runs were tried without it only"
    for name, (first, instead) in WORKS_FROM.items():
        if release < first:
            reasons[name] = f"megatron-core {version} {instead}; {first} and later do as they are told"
    for name in differences.get(release, {"gone": []})["gone"]:
        last = max({OLDEST, *(other for other, fields in differences.items() if name not in fields["gone"])})
        until = OLDEST if last == OLDEST else f"{OLDEST} to {last}"
        reasons[name] = f"megatron-core {version} is installed, and only {until} has it"
    return reasons


def model_settings(config: RunConfig) -> SimpleNamespace:
    """Return the fields of `TransformerConfig` as a run gives them, Megatron-Core's defaults filled in."""
    defaults = {name: field.default for name, field in megatron_fields()["TransformerConfig"].items()}
    return SimpleNamespace(**{**defaults, **config.model.megatron})


def moe_layers(settings: Any) -> list[int]:
    """Return the 0-based decoder layers that are MoE, from `moe_layer_freq`; none for a dense model.

    The settings are those of `model_settings`, or a `TransformerConfig`.
    """
    if not settings.num_moe_experts:
        return []
    frequency, layers = settings.moe_layer_freq, range(settings.num_layers)
    if frequency == 0 or (not isinstance(frequency, int) and len(frequency) != len(layers)):
        raise InputError(
            f"moe_layer_freq is {frequency}; give 1 or more (every so many layers is MoE), or one 0 or 1 for "
            f"each of the {len(layers)} layers"
        )
    if isinstance(frequency, int):
        return [layer for layer in layers if layer % frequency == 0]
    return [layer for layer in layers if frequency[layer]]
