"""The shapes of a row: which keys it has, and how they become a conversation.

A row that cannot be trained on is a ValueError with a short reason, without a location.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_dynmix.config.run_config import RESERVED, FormatName
from megatron_dynmix.data.prepare.conversation import Conversation, Role, Turn, check_order
from megatron_dynmix.data.prepare.items import Item, Names, check_json, entries, from_text, kind, string
from megatron_dynmix.data.prepare.readers import parsed_rows
from megatron_dynmix.data.prepare.tools import read_tools, settled
from megatron_dynmix.data.prepare.turns import OPENAI, SHAREGPT, read_reasoning, read_turns
from megatron_dynmix.errors import InputError

_ROUND: tuple[Role, Role] = ("user", "assistant")
NO_NAMES: Mapping[str, str] = MappingProxyType({})
_SYSTEMS = ("system_prompt", "system")


def parse_sharegpt(row: object) -> Conversation:
    """Read one row of the format `sharegpt`."""
    return Format(name="sharegpt").parse(row)


def _messages(row: Item) -> list[Turn]:
    """``{"messages": [{"role": ..., "content": ...}, ...]}``, as OpenAI has it."""
    return read_turns(row, "messages", OPENAI)


def _sharegpt(row: Item) -> list[Turn]:
    """``{"conversations": [{"from": ..., "value": ...}, ...]}``."""
    return read_turns(row, "conversations", SHAREGPT)


def _alpaca(row: Item) -> list[Turn]:
    """``{"instruction": ..., "input": ..., "output": ...}``; the input follows after an empty line."""
    prompt, more = row.text("instruction"), row.get("input")
    if more is not None and string(row.at("input"), more).strip():
        row.note_marks(more)
        prompt = f"{prompt}\n\n{more}"
    return [*_history(row), Turn("user", prompt), _answer(row, "output")]


def _prompt_completion(row: Item) -> list[Turn]:
    """``{"prompt": ..., "completion": ...}``, each a text or a list of turns."""
    if isinstance(row.need("prompt"), str):
        prompt = [*_history(row), Turn("user", row.text("prompt"))]
    else:
        asked = read_turns(row, "prompt", OPENAI)
        # it is the completion that is to be learnt
        prompt = [replace(turn, is_trained=turn.is_trained or False) for turn in asked]
    if isinstance(row.need("completion"), str):
        return [*prompt, _answer(row, "completion")]
    return [*prompt, *read_turns(row, "completion", OPENAI)]


def _text(row: Item) -> list[Turn]:
    """``{"text": ...}``, all of it trained on."""
    return [Turn("text", row.text("text"))]


def _answer(row: Item, key: str) -> Turn:
    return Turn("assistant", row.text(key), reasoning=read_reasoning(row))


def _history(row: Item) -> list[Turn]:
    """Return earlier rounds: pairs of question and answer, or turns."""
    given = entries(row.at("history"), row.get("history") or [], "rounds")
    if given and isinstance(given[0], dict):
        return read_turns(row, "history", OPENAI)
    turns = []
    for number, pair in enumerate(given, start=1):
        at = f"{row.at('history')}: round {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{at} must be a question and its answer, not {kind(pair)}")
        for role, text in zip(_ROUND, pair, strict=True):
            if not string(at, text).strip():
                raise ValueError(f"{at}: the {role}'s text is empty")
            turns.append(Turn(role, text))
    return turns


def _systems(row: Item) -> list[Turn]:
    """Return the system prompts that stand under keys of the row; a blank one means none."""
    keys = ("system",) if "system" in row.names.fields else _SYSTEMS
    given = [string(row.at(key), row.get(key)) for key in keys if row.get(key) is not None]
    return [Turn("system", text) for text in given if text.strip()]


def _template_kwargs(row: Item) -> Mapping[str, Any]:
    """Return what the row itself gives to the chat template."""
    where, given = row.at("chat_template_kwargs"), row.get("chat_template_kwargs")
    if isinstance(given, str):
        given = from_text(where, given)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be an object, not {kind(given)}")
    if reserved := [name for name in RESERVED if name in given]:
        raise ValueError(f"{where} holds {reserved[0]!r}, which is what the conversation itself is")
    check_json(where, given)
    return given


_CHAT = ("role", "content", "from", "value", "system", "tools")


@dataclass(frozen=True)
class _Shape:
    turns_of: Callable[[Item], list[Turn]]
    fields: tuple[str, ...]
    marks: tuple[str, ...]
    """The keys by which a row of this shape is known."""


_SHAPES: dict[FormatName, _Shape] = {
    "messages": _Shape(_messages, ("messages", *_CHAT), ("messages",)),
    "sharegpt": _Shape(_sharegpt, ("conversations", *_CHAT), ("conversations",)),
    "alpaca": _Shape(
        _alpaca, ("instruction", "input", "output", "history", "system", "tools"), ("instruction",)
    ),
    "prompt-completion": _Shape(
        _prompt_completion,
        ("prompt", "completion", "history", "system", "tools", "role", "content"),
        ("prompt", "completion"),
    ),
    "text": _Shape(_text, ("text",), ("text",)),
}
"""In the order in which a row that has the keys of several is taken: Alpaca files often have a `text` too."""

FORMATS: tuple[FormatName, ...] = tuple(_SHAPES)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A shape of rows, with the names that its keys and the speakers have in them."""

    name: FormatName
    fields: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _names(self) -> Names:
        return Names(self.fields, self.roles)

    def parse(self, row: object) -> Conversation:
        """Return the row as a conversation, with notices of what it holds and is not trained on."""
        item = Item("", row, self._names, [])
        turns = _SHAPES[self.name].turns_of(item)
        if self.name == "text":
            item.note_unread()
            return Conversation(tuple(turns), notices=tuple(item.notices))
        tools, kwargs = read_tools(item), _template_kwargs(item)
        turns = [*_systems(item), *(settled(turn, tools, item.notices) for turn in turns)]
        item.note_unread()
        check_order(turns)
        return Conversation(tuple(turns), tools, kwargs, tuple(item.notices))


def check_format(name: str, fields: Mapping[str, str]) -> None:
    """Refuse a format (``auto``: by the rows) or a field name that does not exist."""
    if name != "auto" and name not in FORMATS:
        raise InputError(f"format {name!r} is unknown; use auto, {', '.join(FORMATS)}")
    shapes = [shape for known, shape in _SHAPES.items() if name in ("auto", known)]
    allowed = dict.fromkeys(key for shape in shapes for key in shape.fields)
    if unknown := [key for key in fields if key not in allowed]:
        raise InputError(
            f"fields: {unknown[0]!r} is no field of format {name}; it has {', '.join(allowed)} "
            "(write our name first, then the name in your rows)"
        )


def find_format(
    rows: Iterable[tuple[str, object]],
    fields: Mapping[str, str] = NO_NAMES,
    roles: Mapping[str, str] = NO_NAMES,
) -> Format:
    """Return the format of a file by its first row (as `parsed_rows` gives them) that has the keys of one.

    Rows before it, and later ones of another shape, are bad rows to whoever parses them. No such row, or one
    with the keys of both chat formats, is an InputError.
    """
    first = None
    for place, row in rows:
        try:
            found = _shapes_of(row, fields)
        except ValueError as error:
            first = first or f"{place}: {error}"
            continue
        if {"messages", "sharegpt"} <= set(found):
            raise InputError(f'{place}: has both "messages" and "conversations"; say which: format: messages')
        known = {key: given for key, given in fields.items() if key in _SHAPES[found[0]].fields}
        return Format(name=found[0], fields=known, roles=roles)
    needed = "; ".join(f"{name}: {', '.join(shape.marks)}" for name, shape in _SHAPES.items())
    raise InputError(
        f"no row has the keys of a known format ({first or 'no row at all'}); rows need the keys of one of "
        f"{needed}; or say which key is which: fields: {{prompt: question, completion: answer}}"
    )


def _shapes_of(row: object, fields: Mapping[str, str]) -> list[FormatName]:
    if isinstance(row, ValueError):
        raise row
    item = Item("", row, Names(fields), [])
    found: list[FormatName] = [
        name
        for name, shape in _SHAPES.items()
        if all(item.get(mark) is not None for mark in shape.marks)
        # a mapping that says nothing to this shape was written for another one
        and not set(fields) - set(shape.fields)
    ]
    if not found:
        assert isinstance(row, dict), "an Item is made of nothing else"
        raise ValueError(f"has the keys {', '.join(map(repr, row)) or 'of nothing'}")
    return found


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Yield the good rows of one file, in its own format; each row that is left out is named on stderr."""
    shape = find_format(parsed_rows(path))
    for place, value in parsed_rows(path):
        try:
            if isinstance(value, ValueError):
                raise value
            yield shape.parse(value)
        except ValueError as error:
            print(f"{place}: left out: {error}", file=sys.stderr)
