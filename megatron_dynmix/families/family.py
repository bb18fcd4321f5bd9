"""What a family of Hugging Face models is here: a dialect of config.json and a name map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_dynmix.families.dialect import Dialect
from megatron_dynmix.families.names import NameMap


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one `model_type`: how config.json says what they are, and where their numbers are."""

    title: str
    """Published models, as people call them."""
    since: str
    """Version of this project that had it first."""
    dialect: Dialect
    names: NameMap
    refused: Mapping[str, str] = field(default_factory=dict)
    """What is refused beside `Dialect.must`, and why."""
