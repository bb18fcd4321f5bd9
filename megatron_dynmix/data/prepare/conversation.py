"""A conversation: an optional system turn, then user and assistant turns by turns, an answer last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool", "text"]

NO_FIELDS: Mapping[str, str] = MappingProxyType({})
_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
_SYSTEM_KEYS = ("system_prompt", "system")


@dataclass(frozen=True)
class Turn:
    """What one speaker says at once; ``extra`` holds the keys of tool calls and results for templates."""

    role: Role
    text: str
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order: at most one system turn, then user and assistant alternating, assistant last.

    An assistant turn with tool calls is followed by tool turns, then by the assistant again. A row of
    plain text is a single turn of the role ``text``. ``tools`` are JSON schemas.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def parse_sharegpt(row: object, fields: Mapping[str, str] = NO_FIELDS) -> Conversation:
    """Read one ShareGPT row: ``{"conversations": [{"from": ..., "value": ...}, ...]}``.

    The system text may stand in the key ``system_prompt`` or ``system``, or be the first turn; null
    or blank means none. Other unknown keys are left alone. Role names: system; human, user; gpt,
    assistant, chatgpt (lower case).

    Args:
        row: the value that was read.
        fields: other names of ``conversations``, ``from``, ``value`` and ``system`` in the row.

    Raises:
        ValueError: the row cannot be trained on; the message is a short reason without a location.

    """
    row = checked_object(row)
    key = fields.get("conversations", "conversations")
    systems = system_turns(row, (fields["system"],) if "system" in fields else _SYSTEM_KEYS)
    turns = systems + [
        _turn_of_item(position, item, fields)
        for position, item in enumerate(checked_items(row, key), start=1)
    ]
    return checked_conversation(turns)


def _turn_of_item(position: int, item: Any, fields: Mapping[str, str]) -> Turn:
    where = f"turn {position}"
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be an object, not {kind(item)}")
    from_key, value_key = fields.get("from", "from"), fields.get("value", "value")
    for key in (from_key, value_key):
        if key not in item:
            raise ValueError(f'{where} has no key "{key}"')
        if not isinstance(item[key], str):
            raise ValueError(f'{where}: "{key}" must be a string, not {kind(item[key])}')
    if item[from_key] not in _ROLES:
        raise ValueError(f"{where}: unknown role {item[from_key]!r} (known: {', '.join(_ROLES)})")
    role = _ROLES[item[from_key]]
    if role != "system" and not item[value_key].strip():
        raise ValueError(f"{where}: the {role}'s text is empty")
    return Turn(role, checked_text(where, item[value_key]))


def checked_object(row: object) -> dict[str, Any]:
    """Return the row if it is a JSON object; a ValueError says what it is otherwise."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {kind(row)}")
    return row


def checked_items(row: Mapping[str, Any], key: str) -> list[Any]:
    """Return the row's list of turns; a ValueError says why there is none."""
    if key not in row:
        raise ValueError(f'no key "{key}"')
    items = row[key]
    if not isinstance(items, list):
        raise ValueError(f'"{key}" must be a list of turns, not {kind(items)}')
    if not items:
        raise ValueError(f'"{key}" is empty')
    return items


def checked_text(where: str, text: object) -> str:
    """Return the text if it is a string that a tokenizer takes; a ValueError says why not."""
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a string, not {kind(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # legal in JSON as \ud800, but no tokenizer takes it
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start}") from error
    return text


def system_turns(row: Mapping[str, Any], keys: Sequence[str]) -> list[Turn]:
    """Return the system prompts that stand under the keys of a row; null means none."""
    return [Turn("system", checked_text(f'"{key}"', row[key])) for key in keys if row.get(key) is not None]


def checked_conversation(turns: Sequence[Turn], tools: tuple[Mapping[str, Any], ...] = ()) -> Conversation:
    """Return the turns, without a blank system prompt; a ValueError says what is out of order."""
    kept = [turn for turn in turns if turn.role != "system" or turn.text.strip()]
    _check_order(kept)
    return Conversation(tuple(kept), tools)


def _check_order(turns: list[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if roles.count("system") > 1:
        raise ValueError("more than one system prompt")
    if "system" in roles:
        if roles[0] != "system":
            raise ValueError("the system turn is not the first")
        turns = turns[1:]
        roles = roles[1:]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so nothing to train on")
    if roles[0] != "user":
        raise ValueError(f"starts with {'an' if roles[0] == 'assistant' else 'a'} {roles[0]} turn")
    for earlier, later in pairwise(turns):
        _check_pair(earlier, later)
    if roles[-1] == "user":
        raise ValueError("ends with a user turn that has no answer")
    if roles[-1] == "tool":
        raise ValueError("ends with a tool's result that has no answer")


def _check_pair(earlier: Turn, later: Turn) -> None:
    is_call = bool(earlier.extra and earlier.extra.get("tool_calls"))
    if later.role == "tool":
        if not is_call and earlier.role != "tool":
            raise ValueError(f"a tool's result after the {earlier.role}'s turn, where no tool was called")
    elif is_call:
        raise ValueError(f"tool calls are followed by the {later.role}, not by a tool's result")
    elif earlier.role == later.role:
        raise ValueError(f"two {later.role} turns in a row")
    elif (earlier.role, later.role) == ("tool", "user"):
        raise ValueError("a tool's result is followed by the user, not by the assistant")


def kind(value: object) -> str:
    """Return how JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
