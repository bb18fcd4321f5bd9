"""What a Hugging Face model's config.json means by not saying it, known without transformers.

`hugging_face_defaults.json` is written by `tools/hugging_face_defaults.py` from the installed version.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.families import FAMILIES, known_as
from megatron_dynmix.families.dialect import Values


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    path = Path(__file__).with_suffix(".json")
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    own = {name: family.dialect.defaults for name, family in FAMILIES.items() if name not in known}
    return known | {
        name: known[str(known_as(name))] if defaults is None else {"defaults": defaults, "names": {}}
        for name, defaults in own.items()
    }


def defaults_of(model_type: str) -> dict[str, Any]:
    """Return what a family's settings are where config.json does not say them."""
    return _table()[model_type]["defaults"]


def completed(config: Values) -> dict[str, Any]:
    """Return a config.json that says everything, each thing by one name."""
    known = _table()[config["model_type"]]
    own = {name: value for name, value in config.items() if name not in known["names"]}
    for other, name in known["names"].items():
        if other in config and own.setdefault(name, config[other]) != config[other]:
            raise InputError(f"{name} is {own[name]!r} and {other}, another name for it, {config[other]!r}")
    return {**known["defaults"], **own}


def unsaid(config: Values) -> str:
    """Return a remark on sizes that config.json does not say, nothing if it says all."""
    known = _table()[config["model_type"]]
    said = {known["names"].get(name, name) for name in config}
    absent = (
        f"{name} {value}"
        for name, value in sorted(known["defaults"].items())
        if type(value) is int and name not in said
    )
    found = ", ".join(absent)
    return f" (of what config.json does not say, transformers assumes {found})" if found else ""
