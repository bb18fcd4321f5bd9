"""Every leaf of the configuration: its name, section, type and where it comes from.

Leaf names are unique over all sections, so each is also a flag. Ours come from `run_config.py`, the others
are fields of Megatron-Core's dataclasses; those that `decided.py` names cannot be set to another value.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from megatron_dynmix.config import run_config as tree
from megatron_dynmix.config.decided import DECIDED, OVERRULED
from megatron_dynmix.config.strategies import option_hints
from megatron_dynmix.errors import InputError

FLAG_ALIASES = {
    "num-experts": "num_moe_experts",
    "norm-epsilon": "layernorm_epsilon",
    "swiglu": "gated_linear_unit",
    "tokenizer-model": "tokenizer",
    "disable-bias-linear": "no-add_bias_linear",
    "mixing-unit": "unit",
}
"""Flags whose name differs from the field's, mostly Megatron-LM's; `no-` sets the field to false."""


WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    **dict.fromkeys((dict, Mapping), "a mapping {name: value}"),
    type(None): "null",
}
"""Types in a user's words."""
UNIONS = (typing.Union, types.UnionType)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One value that can be set."""

    name: str
    section: str
    hint: Any


def mixing_leaves() -> dict[str, Leaf]:
    """Return the leaves of the mixing section, options of strategies included."""
    options = {name: Leaf(name, "mixing", hint) for name, hint in option_hints().items()}
    return {**_own_leaves("mixing", tree.MixingConfig), **options}


@functools.cache
def all_leaves() -> dict[str, Leaf]:
    """Return name -> leaf, ours first."""
    from megatron_dynmix.config.megatron_fields import SECTIONS, megatron_fields  # not for `update`

    leaves: dict[str, Leaf] = {}
    for section, owner in tree.SECTIONS.items():
        leaves |= _own_leaves(section, owner)
    leaves |= mixing_leaves()
    for megatron, fields in megatron_fields().items():
        for name, field in fields.items():
            leaves.setdefault(name, Leaf(name, SECTIONS[megatron], field.hint))
    return leaves


@functools.cache
def refused() -> dict[str, str]:
    """Return the fields of any version of Megatron-Core that cannot be set, and why."""
    from megatron_dynmix.config.megatron_fields import unavailable_fields

    return {**unavailable_fields(), **DECIDED}


def _own_leaves(section: str, owner: type) -> dict[str, Leaf]:
    hints = typing.get_type_hints(owner)
    return {
        name: Leaf(name, section, hint) for name, hint in hints.items() if name not in (*tree.FLAT, "sources")
    }


def is_usual(name: str, value: Any) -> bool:
    """Whether a setting that cannot be given is given the value that every run has, Megatron-Core's own."""
    from megatron_dynmix.config.megatron_fields import changed_fields, megatron_fields, unavailable_fields

    if name not in DECIDED or name in (*OVERRULED, *unavailable_fields(), *changed_fields()):
        return False
    field = next(fields[name] for fields in megatron_fields().values() if name in fields)
    try:
        return bool(coerce(value, field.hint, name) == field.default)
    except InputError:
        return False


def find(name: str, value: Any = ...) -> Leaf:
    """Return the leaf of that name; refuse an unknown one, and one that cannot be set, with the reason.

    `value` is what it is given: one that `is_usual` is not refused.
    """
    if name in refused() and not is_usual(name, value):
        raise InputError(f"{name} cannot be set: {refused()[name]}")
    if name not in all_leaves():
        raise InputError(f"{name} is no setting{nearest(name, all_leaves())}")
    return all_leaves()[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name most like `name`, or nothing."""
    # at 0.6, the default, `aggregate` would be like `learning_rate`
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def coerce(value: Any, hint: Any, name: str) -> Any:
    """Return `value` as the type that `hint` asks for; refuse one whose meaning that would change."""
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError:
        raise InputError(f"{name} is {value!r}; it must be {describe(hint)}") from None


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_as_written(hint), config=ConfigDict(strict=True))


def _as_written(hint: Any) -> Any:
    """Return a type that takes values as YAML writes them: 2e-5 is text there, and a tuple a list."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if hint is float:
        return Annotated[float, BeforeValidator(_number)]
    if origin in UNIONS:
        return functools.reduce(operator.or_, map(_as_written, members))
    if tuple in (hint, origin):
        items = tuple(map(_as_written, members)) or (Any, ...)
        return Annotated[tuple[items], BeforeValidator(_tuple)]  # type: ignore[valid-type]
    if origin is list:
        return list[_as_written(members[0])]  # type: ignore[misc]
    return dict if origin is dict else hint  # whoever reads a mapping checks its values


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def describe(hint: Any) -> str:
    """Return a type in a user's words: `text or null`, `a list whose items are each a whole number`."""
    members = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind in UNIONS:
        return " or ".join(map(describe, members))
    if kind is typing.Literal:
        return "one of " + ", ".join(map(str, members))
    if kind in (list, tuple, Sequence):
        element = next((member for member in members if member not in (Any, ...)), None)
        return "a list" if element is None else f"a list whose items are each {describe(element)}"
    return WORDS[kind]


def from_text(text: str, leaf: Leaf, flag: str) -> Any:
    """Return a flag's text as the leaf's type."""
    if leaf.hint is str:
        return text
    if leaf.hint == str | None:  # YAML would read a folder called 2024 as a number
        return None if text == "null" else text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return coerce(value, leaf.hint, flag)
