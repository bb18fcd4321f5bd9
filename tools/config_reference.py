"""Write the page of all settings from the dataclasses that define them.

    python tools/config_reference.py docs/configuration.md

Names, types, defaults and meanings are those of `config/run_config.py` and the strategies; of
Megatron-Core's fields, names, types and defaults. What can not be set is listed
with the reason.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dynmix.config import leaves
from megatron_dynmix.config import megatron_fields as known
from megatron_dynmix.config import run_config as tree
from megatron_dynmix.config.decided import DECIDED, OVERRULED
from megatron_dynmix.config.idle import MASTERS
from megatron_dynmix.mixing.strategies import STRATEGIES

HEAD = """# Configuration reference

Every setting of `RUN.yaml`. Each is a flag too, `--seq-length 2048` for `seq_length`, and flags win over
the file; a boolean is switched on by `--bf16`, off by `--no-bf16`. Unknown names are refused, with the
nearest known one. Relative paths in the file start at its own folder, in flags at the current one; `${NAME}`
is an environment variable.

This page is written by `python tools/config_reference.py docs/configuration.md`.
"""

IDLE = """These are refused, other values than Megatron-Core's own or those of the preset.
"""


DECIDED_WHY = """Megatron-Core's own value may be given and changes nothing; another one is refused.
Not even that may be given of {overruled}: a run has another one.
"""


def reference() -> str:
    """Return the whole page as Markdown."""
    parts = [HEAD]
    for section, owner in tree.SECTIONS.items():
        parts += [f"## {section}\n", first_sentence(owner) + "\n", table(own_rows(owner))]
        if section == "data":
            parts += ["### data.sources.NAME\n", first_sentence(tree.SourceConfig) + "\n"]
            parts += [table(own_rows(tree.SourceConfig))]
        if section == "mixing":
            parts += list(strategies())
    parts += list(megatron_fields())
    needing = [(", ".join(f"`{name}`" for name in one.settings), f"unless {one.words}") for one in MASTERS]
    parts += ["## What does nothing alone\n", IDLE, table(needing)]
    overruled = ", ".join(f"`{name}`" for name in OVERRULED)
    parts += [
        "## What cannot be set\n",
        DECIDED_WHY.format(overruled=overruled),
        table([(f"`{name}`", why) for name, why in DECIDED.items()]),
    ]
    return "\n".join(parts)


def own_rows(owner: type) -> list[tuple[str, ...]]:
    """Return name, type, default and meaning of each setting of one of our sections."""
    meanings, hints = attribute_docs(owner), typing.get_type_hints(owner)
    shown = [item for item in dataclasses.fields(owner) if item.name not in ("megatron", "options")]
    return [
        (f"`{item.name}`", kind_of(hints[item.name]), default_of(item), meanings[item.name]) for item in shown
    ]


def strategies() -> Iterator[str]:
    """Yield the options of every strategy that has any."""
    yield "### Options of the strategies\n"
    yield "They stand in the mixing section, beside `strategy`; see [the strategies](algorithm.md).\n"
    for name, strategy in STRATEGIES.items():
        kind: Any = strategy
        meanings, hints = listed_attributes(kind), typing.get_type_hints(kind)
        rows = [
            (f"`{item.name}`", kind_of(hints[item.name]), default_of(item), meanings[item.name])
            for item in dataclasses.fields(kind)
            if item.name in leaves.all_leaves()
        ]
        if rows:
            yield f"#### {name}\n"
            yield first_sentence(kind) + "\n"
            yield table(rows)


def megatron_fields() -> Iterator[str]:
    """Yield the fields of Megatron-Core's own dataclasses, by the section they are given in."""
    yield "## Fields of Megatron-Core\n"
    yield "They stand in the section named, beside our settings; Megatron-Core 0.16.1 says what they mean.\n"
    ours = {item.name for owner in tree.SECTIONS.values() for item in dataclasses.fields(owner)}
    listed = {*ours, *DECIDED}
    for owner, given in known.megatron_fields().items():
        rows = [
            (f"`{name}`", kind_of(item.hint), shown(item.default))
            for name, item in given.items()
            if name not in listed
        ]
        listed |= given.keys()
        yield f"### {known.SECTIONS[owner]}: {owner}\n"
        yield table(rows)


def attribute_docs(owner: type) -> dict[str, str]:
    """Return the text under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def listed_attributes(owner: type) -> dict[str, str]:
    """Return the entries under `Attributes:` in the docstrings of a strategy and of what it is built on."""
    listed: dict[str, str] = {}
    for kind in reversed(owner.__mro__):
        doc = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"^    (?=\w[\w, ]*: )", doc, flags=re.MULTILINE)[1:]:
            names, _, text = entry.partition(": ")
            listed |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return listed


def first_sentence(owner: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(owner) or "").splitlines()[0]


def kind_of(hint: Any) -> str:
    """Return a type as a user reads it."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    return leaves.describe(hint)


def default_of(item: dataclasses.Field[Any]) -> str:
    """Return a field's default as YAML has it."""
    if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
        return "required"
    return shown(item.default_factory() if item.default is dataclasses.MISSING else item.default)


def shown(value: Any) -> str:
    """Return a value as YAML has it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def table(rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; its columns are name, type, default, meaning, as many as there are."""
    heads = {2: ("name", "why"), 3: ("name", "type", "default"), 4: ("name", "type", "default", "meaning")}
    head = heads[len(rows[0])]
    lines = [head, ("---",) * len(head), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path)
    parser.parse_args().output.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
