"""A conversation: an optional system turn, then user and assistant turns by turns, an answer last."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

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
    """What one speaker says at once."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order: at most one system turn, then user and assistant alternating, assistant last."""

    turns: tuple[Turn, ...]


def parse_sharegpt(row: object) -> Conversation:
    """Read one ShareGPT row: ``{"conversations": [{"from": ..., "value": ...}, ...]}``.

    The system text may stand in the key ``system_prompt`` or ``system``, or be the first turn; null
    or blank means none. Other unknown keys are left alone. Role names: system; human, user; gpt,
    assistant, chatgpt (lower case).

    Raises:
        ValueError: the row cannot be trained on; the message is a short reason without a location.

    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {_kind(row)}")
    if "conversations" not in row:
        raise ValueError('no key "conversations"')
    items = row["conversations"]
    if not isinstance(items, list):
        raise ValueError(f'"conversations" must be a list of turns, not {_kind(items)}')
    if not items:
        raise ValueError('"conversations" is empty')
    systems = [_turn_of_key(key, row[key]) for key in _SYSTEM_KEYS if row.get(key) is not None]
    turns = systems + [_turn_of_item(position, item) for position, item in enumerate(items, start=1)]
    turns = [turn for turn in turns if turn.role != "system" or turn.text.strip()]
    _check_order(turns)
    return Conversation(tuple(turns))


def _turn_of_key(key: str, text: Any) -> Turn:
    if not isinstance(text, str):
        raise ValueError(f'"{key}" must be a string, not {_kind(text)}')
    return Turn("system", _checked_text(f'"{key}"', text))


def _turn_of_item(position: int, item: Any) -> Turn:
    where = f"turn {position}"
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be an object, not {_kind(item)}")
    for key in ("from", "value"):
        if key not in item:
            raise ValueError(f'{where} has no key "{key}"')
        if not isinstance(item[key], str):
            raise ValueError(f'{where}: "{key}" must be a string, not {_kind(item[key])}')
    if item["from"] not in _ROLES:
        raise ValueError(f"{where}: unknown role {item['from']!r} (known: {', '.join(_ROLES)})")
    role = _ROLES[item["from"]]
    if role != "system" and not item["value"].strip():
        raise ValueError(f"{where}: the {role}'s text is empty")
    return Turn(role, _checked_text(where, item["value"]))


def _checked_text(where: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # legal in JSON as \ud800, but no tokenizer takes it
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start}") from error
    return text


def _check_order(turns: list[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if roles.count("system") > 1:
        raise ValueError("more than one system prompt")
    if "system" in roles:
        if roles[0] != "system":
            raise ValueError("the system turn is not the first")
        roles = roles[1:]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so nothing to train on")
    if roles[0] == "assistant":
        raise ValueError("starts with an assistant turn")
    for earlier, later in pairwise(roles):
        if earlier == later:
            raise ValueError(f"two {later} turns in a row")
    if roles[-1] == "user":
        raise ValueError("ends with a user turn that has no answer")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
