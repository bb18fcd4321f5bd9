"""The shapes of a row: which keys it has, and how they become a conversation.

Every ``parse_...`` takes the value of a row and ``fields``, other names of our keys in it; a row that cannot
be trained on is a ValueError with a short reason, without a location.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dynmix.config.run_config import FormatName
from megatron_dynmix.data.prepare.conversation import (
    NO_FIELDS,
    Conversation,
    Role,
    Turn,
    checked_conversation,
    checked_items,
    checked_object,
    checked_text,
    kind,
    system_turns,
)
from megatron_dynmix.data.prepare.readers import parsed_rows
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import parse_json

_MESSAGE_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
_SYSTEM_KEYS = ("system_prompt", "system")
_TOOL_KEYS = ("tool_calls", "tool_call_id", "name")


def parse_messages(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one OpenAI row: ``{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}``.

    Roles: system, developer (the same), user, assistant, tool. ``content`` may be null beside
    ``tool_calls``, whose arguments may be an object or JSON in a string; templates get the object.
    ``tools``, too, may be a list or JSON in a string. Unknown keys are left alone, ``weight`` included.
    """
    row = checked_object(row)
    tools = _json_objects('"tools"', row.get(fields.get("tools", "tools")))
    turns = _turns(row, fields.get("messages", "messages"), _turn_of_message, fields)
    return checked_conversation(turns, tuple(tools))


def parse_sharegpt(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one ShareGPT row: ``{"conversations": [{"from": ..., "value": ...}, ...]}``.

    The system text may be under the key ``system_prompt`` or ``system``, or be the first turn; null
    or blank means none. Other unknown keys are left alone. Role names: system; human, user; gpt,
    assistant, chatgpt (lower case).
    """
    row = checked_object(row)
    systems = system_turns(row, (fields["system"],) if "system" in fields else _SYSTEM_KEYS)
    key = fields.get("conversations", "conversations")
    return checked_conversation(systems + _turns(row, key, _turn_of_item, fields))


def _turns(
    row: Mapping[str, Any],
    key: str,
    turn_of: Callable[[str, dict[str, Any], Mapping[str, str]], Turn],
    fields: Mapping[str, str],
) -> list[Turn]:
    turns = []
    for position, item in enumerate(checked_items(row, key), start=1):
        where = f"turn {position}"
        if not isinstance(item, dict):
            raise ValueError(f"{where} must be an object, not {kind(item)}")
        turns.append(turn_of(where, item, fields))
    return turns


def _string_at(where: str, item: dict[str, Any], key: str) -> str:
    if key not in item:
        raise ValueError(f'{where} has no key "{key}"')
    if not isinstance(item[key], str):
        raise ValueError(f'{where}: "{key}" must be a string, not {kind(item[key])}')
    return str(item[key])


def _role(where: str, given: str, roles: Mapping[str, Role]) -> Role:
    if given not in roles:
        raise ValueError(f"{where}: unknown role {given!r} (known: {', '.join(roles)})")
    return roles[given]


def _turn_of_item(where: str, item: dict[str, Any], fields: Mapping[str, str]) -> Turn:
    said_by, text = (_string_at(where, item, fields.get(key, key)) for key in ("from", "value"))
    role = _role(where, said_by, _SHAREGPT_ROLES)
    if role != "system" and not text.strip():
        raise ValueError(f"{where}: the {role}'s text is empty")
    return Turn(role, checked_text(where, text))


def _turn_of_message(where: str, item: dict[str, Any], fields: Mapping[str, str]) -> Turn:
    content_key = fields.get("content", "content")
    role = _role(where, _string_at(where, item, fields.get("role", "role")), _MESSAGE_ROLES)
    extra = {key: item[key] for key in _TOOL_KEYS if item.get(key) is not None}
    calls = _tool_calls(where, extra.pop("tool_calls", None))
    if calls:
        if role != "assistant":
            raise ValueError(f"{where}: the {role} calls tools; only the assistant can")
        extra["tool_calls"] = calls
    content = item.get(content_key)
    if content is None and calls:
        content = ""
    elif content_key not in item:
        raise ValueError(f'{where} has no key "{content_key}"')
    _check_json(where, extra)
    text = checked_text(f'{where}: "{content_key}"', content)
    if role in ("user", "assistant") and not calls and not text.strip():
        raise ValueError(f"{where}: the {role}'s text is empty")
    return Turn(role, text, extra if calls or role == "tool" else None)


def _tool_calls(where: str, given: object) -> list[dict[str, Any]]:
    calls = []
    for call in _json_objects(f'{where}: "tool_calls"', given):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'{where}: a tool call has no "function" with a "name"')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(f"{where}: arguments of {function['name']!r}", arguments)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def _json_objects(where: str, given: object) -> list[dict[str, Any]]:
    if isinstance(given, str):
        given = _json(where, given)
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise ValueError(f"{where} must be a list of objects")
    _check_json(where, given)
    return given


def _check_json(where: str, value: object) -> None:
    """Refuse what no template can write: Parquet has types that JSON has not, JSON has half surrogates."""
    try:
        checked_text(where, json.dumps(value, ensure_ascii=False))
    except TypeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def _json(where: str, text: str) -> Any:
    try:
        return parse_json(checked_text(where, text).encode())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def parse_alpaca(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one Alpaca row: ``{"instruction": ..., "input": ..., "output": ...}``.

    A non-blank ``input`` (it may be null or absent) follows the instruction after an empty line;
    ``system`` is optional.
    """
    row = checked_object(row)
    prompt = _text(row, fields.get("instruction", "instruction"))
    more_key = fields.get("input", "input")
    more = checked_text(f'"{more_key}"', row[more_key]) if row.get(more_key) is not None else ""
    answer = _text(row, fields.get("output", "output"))
    return _one_round(row, fields, f"{prompt}\n\n{more}" if more.strip() else prompt, answer)


def parse_prompt_completion(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one row ``{"prompt": ..., "completion": ...}``; ``system`` is optional."""
    row = checked_object(row)
    prompt = _text(row, fields.get("prompt", "prompt"))
    return _one_round(row, fields, prompt, _text(row, fields.get("completion", "completion")))


def parse_text(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one row ``{"text": ...}``, all of it trained on."""
    return Conversation((Turn("text", _text(checked_object(row), fields.get("text", "text"))),))


def _one_round(row: Mapping[str, Any], fields: Mapping[str, str], prompt: str, answer: str) -> Conversation:
    systems = system_turns(row, (fields.get("system", "system"),))
    return checked_conversation([*systems, Turn("user", prompt), Turn("assistant", answer)])


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f'no key "{key}"')
    text = checked_text(f'"{key}"', row[key])
    if not text.strip():
        raise ValueError(f'"{key}" is empty')
    return text


@dataclass(frozen=True)
class _Shape:
    parse: Callable[[object, Mapping[str, str]], Conversation]
    fields: tuple[str, ...]
    marks: tuple[str, ...]
    """The keys by which a row of this shape is known."""


_SHAPES: dict[FormatName, _Shape] = {
    "messages": _Shape(parse_messages, ("messages", "role", "content", "tools"), ("messages",)),
    "sharegpt": _Shape(parse_sharegpt, ("conversations", "from", "value", "system"), ("conversations",)),
    "alpaca": _Shape(parse_alpaca, ("instruction", "input", "output", "system"), ("instruction",)),
    "prompt-completion": _Shape(
        parse_prompt_completion, ("prompt", "completion", "system"), ("prompt", "completion")
    ),
    "text": _Shape(parse_text, ("text",), ("text",)),
}
"""In the order in which a row that has the keys of several is taken: Alpaca files often have a `text` too."""

FORMATS: tuple[FormatName, ...] = tuple(_SHAPES)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A shape of rows, with the names that its keys have in them."""

    name: FormatName
    fields: Mapping[str, str] = field(default_factory=dict)

    def parse(self, row: object) -> Conversation:
        """Return the row as a conversation."""
        return _SHAPES[self.name].parse(row, self.fields)


def check_format(name: str, fields: Mapping[str, str]) -> None:
    """Refuse a format (``auto``: by the rows) or a field name that does not exist."""
    if name != "auto" and name not in FORMATS:
        raise InputError(f"format {name!r} is unknown; use auto, {', '.join(FORMATS)}")
    shapes = [shape for known, shape in _SHAPES.items() if name in ("auto", known)]
    allowed = {key: None for shape in shapes for key in shape.fields}
    for key in fields:
        if key not in allowed:
            raise InputError(
                f"fields: {key!r} is no field of format {name}; it has {', '.join(allowed)} "
                "(write our name first, then the name in your rows)"
            )


def find_format(rows: Iterable[tuple[str, object]], fields: Mapping[str, str] = NO_FIELDS) -> Format:
    """Return the format of a file by its first row that has the keys of one.

    ``rows`` are as `parsed_rows` gives them. Rows before it, and later ones of another shape, are bad rows to
    whoever parses them.

    Raises:
        InputError: no row has the keys of a format, or one has those of two chat formats.

    """
    first = "no row at all"
    for count, (place, row) in enumerate(rows):
        try:
            found = _shapes_of(row, fields)
        except ValueError as error:
            if not count:
                first = f"{place}: {error}"
            continue
        if {"messages", "sharegpt"} <= set(found):
            raise InputError(f'{place}: has both "messages" and "conversations"; say which: format: messages')
        return Format(name=found[0], fields=_fields_of(found[0], fields))
    needed = "; ".join(f"{name}: {', '.join(shape.marks)}" for name, shape in _SHAPES.items())
    raise InputError(
        f"no row has the keys of a known format ({first}); rows need the keys of one of {needed}; "
        "or say which key is which: fields: {prompt: question, completion: answer}"
    )


def _shapes_of(row: object, fields: Mapping[str, str]) -> list[FormatName]:
    if isinstance(row, ValueError):
        raise row
    keys = checked_object(row)
    found: list[FormatName] = [
        name
        for name, shape in _SHAPES.items()
        if all(fields.get(mark, mark) in keys for mark in shape.marks)
        # a mapping that says nothing to this shape was written for another one
        and not set(fields) - set(shape.fields)
    ]
    if not found:
        raise ValueError(f"has the keys {', '.join(map(repr, keys)) or 'of nothing'}")
    return found


def _fields_of(name: FormatName, fields: Mapping[str, str]) -> dict[str, str]:
    return {key: given for key, given in fields.items() if key in _SHAPES[name].fields}


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
