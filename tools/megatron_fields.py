"""Write the table of Megatron-Core's settings from the version that is installed.

    python tools/megatron_fields.py megatron_dynmix/config

With the oldest supported version this is `megatron_fields.json`; with a later one its entry in
`megatron_versions.json`: the fields it has no longer, those it has more, those of another type or default.

Each dataclass has its fields without those it inherits, each field its type and default. Types that YAML
cannot write (functions, dtypes, objects) are left out of unions; a field of nothing else is left out, unless
a reason is known why it cannot be set.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_dynmix import platform
from megatron_dynmix.config.decided import DECIDED
from megatron_dynmix.config.megatron_fields import OLDEST, installed

OWNERS = {
    "ModelParallelConfig": "megatron.core.model_parallel_config",
    "DistributedDataParallelConfig": "megatron.core.distributed",
    "TransformerConfig": "megatron.core.transformer.transformer_config",
    "MLATransformerConfig": "megatron.core.transformer.transformer_config",
    "OptimizerConfig": "megatron.core.optimizer",
}
MAY_BE_NULL = ("q_lora_rank",)
"""Fields that Megatron-Core lets be None, though their annotation does not say so."""


def megatron_table() -> dict[str, dict[str, tuple[str, Any]]]:
    """Return dataclass -> field -> (type as Python source, default)."""
    platform.start()
    kinds = {name: getattr(importlib.import_module(module), name) for name, module in OWNERS.items()}
    return {name: dict(_rows(kind)) for name, kind in kinds.items()}


def _rows(kind: Any) -> typing.Iterator[tuple[str, tuple[str, Any]]]:
    hints = typing.get_type_hints(kind)
    inherited = {
        field.name for base in kind.__bases__ if base is not object for field in dataclasses.fields(base)
    }
    for field in dataclasses.fields(kind):
        text = type_text(hints[field.name])
        decided = field.name in DECIDED
        if field.name in inherited or field.name.startswith("_") or not (text or decided):
            continue
        made = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if made else field.default  # type: ignore[misc]
        text = f"{text} | None" if field.name in MAY_BE_NULL else text
        plain = value.name if isinstance(value, Enum) else value if text else None
        yield field.name, (text or "Any", plain)


def type_text(hint: Any) -> str:
    """Return a type as Python source; empty for one that YAML cannot write."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        texts = [type_text(member) for member in members]
        return " | ".join(filter(None, texts)) if set(texts) - {"", "None"} else ""
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, members))}]"
    if origin in (list, tuple, dict):
        return f"{origin.__name__}[{', '.join(map(type_text, members))}]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"Literal[{', '.join(map(repr, hint.__members__))}]"
    return (
        "None" if hint is type(None) else hint.__name__ if hint in (int, float, bool, str, list, dict) else ""
    )


def difference(table: dict[str, dict[str, Any]], oldest: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return the names of fields that only the oldest version has, only this one, or both with other rows."""
    here, there = (
        {name: row for rows in fields.values() for name, row in rows.items()}
        for fields in (json.loads(json.dumps(table)), oldest)
    )
    return {
        "gone": sorted(there.keys() - here.keys()),
        "new": sorted(here.keys() - there.keys()),
        "changed": sorted(name for name in here.keys() & there.keys() if here[name] != there[name]),
    }


def main() -> None:
    """Write the table, or the difference from it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    table, release = megatron_table(), installed()[0]
    fields, versions = folder / "megatron_fields.json", folder / "megatron_versions.json"
    if release != OLDEST:
        known = json.loads(versions.read_text()) if versions.is_file() else {}
        known[release] = difference(table, json.loads(fields.read_text()))
        text = json.dumps(dict(sorted(known.items())), indent=1) + "\n"
        versions.write_text(text, encoding="utf-8")
        return
    owners = [
        f" {json.dumps(owner)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        for owner, rows in table.items()
    ]
    text = "{\n" + "\n },\n".join(owners) + "\n }\n}\n"
    fields.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
