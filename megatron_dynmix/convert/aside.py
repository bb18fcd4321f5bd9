"""What a folder holds beside the model that is trained, and which comes back on export as it was.

Layers for multi-token prediction, and all but the text part of a multimodal model. Quantized weights among
them come back as the plain floats that they stand for, as the model's own do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

HEAD = "lm_head.weight"
PREFIXES = ("model.language_model.", "language_model.")
"""What names of the text part begin with in a multimodal model: in the place of `model.`, or before all."""
FILE = "aside.safetensors"
"""File that holds it beside a checkpoint's folders."""


def prefix_of(names: Iterable[str]) -> str | None:
    """Return which of `PREFIXES` the tensors of a text part have; None if they have neither."""
    every = list(names)
    return next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in every)), None)


def in_model(name: str, prefix: str) -> str | None:
    """Return what a tensor of a folder is called in its language model; None if it is no part of that."""
    inside = prefix.startswith("model.")
    if name.startswith(prefix):
        return ("model." if inside else "") + name.removeprefix(prefix)
    return name if inside and name == HEAD else None


def in_folder(name: str, prefix: str) -> str:
    """Return what a tensor of a language model is called in its folder: `in_model` undone."""
    if not prefix.startswith("model."):
        return prefix + name
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


def aside_text(names: Iterable[str]) -> str:
    """Say which tensors are kept aside, and what becomes of them."""
    every = sorted(names)
    parts = [name for name, _ in itertools.groupby(every, _part_of)]
    return (
        f"{len(every)} tensors ({', '.join(f'{part}.*' for part in parts)}) that are no part of the model "
        "here: they are not trained, and an export has them as they are"
    )


def _part_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: {"model.layers": 3}.get(".".join(parts[:2]), 1 + (parts[0] == "model"))])
