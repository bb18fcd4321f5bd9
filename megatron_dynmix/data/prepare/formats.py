"""The shapes of a row: which keys it has, and how they become a conversation.

Every ``parse_...`` takes the value of a row and ``fields``, other names of our keys in it; a row that cannot
be trained on is a ValueError with a short reason, without a location.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_dynmix.config.run_config import FormatName
from megatron_dynmix.data.prepare.conversation import Conversation, Role, Turn, checked_conversation
from megatron_dynmix.data.prepare.readers import parsed_rows
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import Number, parse_json

NO_FIELDS: Mapping[str, str] = MappingProxyType({})
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
    row = _object(row)
    tools = _json_objects('"tools"', row.get(fields.get("tools", "tools")))
    turns = _turns(row, fields.get("messages", "messages"), _turn_of_message, fields)
    return checked_conversation(turns, tuple(tools))


def parse_sharegpt(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one ShareGPT row: ``{"conversations": [{"from": ..., "value": ...}, ...]}``.

    The system text may be under the key ``system_prompt`` or ``system``, or be the first turn; null
    or blank means none. Other unknown keys are left alone. Role names: system; human, user; gpt,
    assistant, chatgpt (lower case).
    """
    row = _object(row)
    systems = _systems(row, (fields["system"],) if "system" in fields else _SYSTEM_KEYS)
    key = fields.get("conversations", "conversations")
    return checked_conversation(systems + _turns(row, key, _turn_of_item, fields))


def _object(row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {_kind(row)}")
    return row


def _systems(row: Mapping[str, Any], keys: Sequence[str]) -> list[Turn]:
    """Return the system prompts that stand under the keys of a row; null means none."""
    return [Turn("system", _string(f'"{key}"', row[key])) for key in keys if row.get(key) is not None]


def _string(where: str, text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a string, not {_kind(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # legal in JSON as \ud800, but no tokenizer takes it
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start}") from error
    return text


def _kind(value: object) -> str:
    """Return how JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _turns(
    row: Mapping[str, Any],
    key: str,
    turn_of: Callable[[str, dict[str, Any], Mapping[str, str]], Turn],
    fields: Mapping[str, str],
) -> list[Turn]:
    if key not in row:
        raise ValueError(f'no key "{key}"')
    if not isinstance(row[key], list):
        raise ValueError(f'"{key}" must be a list of turns, not {_kind(row[key])}')
    if not row[key]:
        raise ValueError(f'"{key}" is empty')
    turns = []
    for position, item in enumerate(row[key], start=1):
        where = f"turn {position}"
        if not isinstance(item, dict):
            raise ValueError(f"{where} must be an object, not {_kind(item)}")
        turns.append(turn_of(where, item, fields))
    return turns


def _string_at(where: str, item: dict[str, Any], key: str) -> str:
    if key not in item:
        raise ValueError(f'{where} has no key "{key}"')
    if not isinstance(item[key], str):
        raise ValueError(f'{where}: "{key}" must be a string, not {_kind(item[key])}')
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
    return Turn(role, _string(where, text))


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
    text = _string(f'{where}: "{content_key}"', content)
    if role in ("user", "assistant") and not calls and not text.strip():
        raise ValueError(f"{where}: the {role}'s text is empty")
    return Turn(role, text, extra if calls or role == "tool" else {})


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
        _string(where, json.dumps(value, ensure_ascii=False))
    except TypeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def _json(where: str, text: str) -> Any:
    try:
        return parse_json(_string(where, text).encode(), Number)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def parse_alpaca(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one Alpaca row: ``{"instruction": ..., "input": ..., "output": ...}``.

    A non-blank ``input`` (it may be null or absent) follows the instruction after an empty line;
    ``system`` is optional.
    """
    row = _object(row)
    prompt = _text(row, fields.get("instruction", "instruction"))
    more_key = fields.get("input", "input")
    more = _string(f'"{more_key}"', row[more_key]) if row.get(more_key) is not None else ""
    answer = _text(row, fields.get("output", "output"))
    return _one_round(row, fields, f"{prompt}\n\n{more}" if more.strip() else prompt, answer)


def parse_prompt_completion(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one row ``{"prompt": ..., "completion": ...}``; ``system`` is optional."""
    row = _object(row)
    prompt = _text(row, fields.get("prompt", "prompt"))
    return _one_round(row, fields, prompt, _text(row, fields.get("completion", "completion")))


def parse_text(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one row ``{"text": ...}``, all of it trained on."""
    return Conversation((Turn("text", _text(_object(row), fields.get("text", "text"))),))


def _one_round(row: Mapping[str, Any], fields: Mapping[str, str], prompt: str, answer: str) -> Conversation:
    systems = _systems(row, (fields.get("system", "system"),))
    return checked_conversation([*systems, Turn("user", prompt), Turn("assistant", answer)])


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f'no key "{key}"')
    text = _string(f'"{key}"', row[key])
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
    allowed = dict.fromkeys(key for shape in shapes for key in shape.fields)
    if unknown := [key for key in fields if key not in allowed]:
        raise InputError(
            f"fields: {unknown[0]!r} is no field of format {name}; it has {', '.join(allowed)} "
            "(write our name first, then the name in your rows)"
        )


def find_format(rows: Iterable[tuple[str, object]], fields: Mapping[str, str] = NO_FIELDS) -> Format:
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
        return Format(name=found[0], fields=known)
    needed = "; ".join(f"{name}: {', '.join(shape.marks)}" for name, shape in _SHAPES.items())
    raise InputError(
        f"no row has the keys of a known format ({first or 'no row at all'}); rows need the keys of one of "
        f"{needed}; or say which key is which: fields: {{prompt: question, completion: answer}}"
    )


def _shapes_of(row: object, fields: Mapping[str, str]) -> list[FormatName]:
    if isinstance(row, ValueError):
        raise row
    keys = _object(row)
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
