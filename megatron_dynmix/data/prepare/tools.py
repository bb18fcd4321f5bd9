"""Tools: the schemas that a row gives, and the calls of a turn, both as OpenAI has them.

What cannot be one is a ValueError with a short reason, without a location.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_dynmix.data.prepare.conversation import Turn
from megatron_dynmix.data.prepare.items import Item, check_json, entries, from_text, kind
from megatron_dynmix.data.prepare.notices import Notice
from megatron_dynmix.data.prepare.structs import settle_nulls

_TOOLS = ("tools", "functions")


def read_tools(row: Item) -> tuple[Mapping[str, Any], ...]:
    """Return the schemas of a row, from a list or JSON text under one of two names.

    As they were given; but `functions`, and schemas of ShareGPT rows without what OpenAI has around them, are
    given that, as templates expect it.
    """
    given = {key: value for key in _TOOLS if (value := row.get(key)) not in (None, "", "null")}
    tools = [
        _schema(row, key, tool, is_bare=key == "functions" or "conversations" in row)
        for key, value in given.items()
        for tool in entries(row.at(key), value)
    ]
    if len(given) > 1:
        raise ValueError(f"has both {' and '.join(map(repr, given))}; keep one")
    check_json(row.at("tools"), tools)
    return tuple(tools)


def _schema(row: Item, key: str, tool: object, is_bare: bool) -> Mapping[str, Any]:
    if isinstance(tool, str):
        tool = from_text(row.at(key), tool)
    if not isinstance(tool, dict):
        raise ValueError(f"{row.at(key)} must be a list of objects, not of {kind(tool)}")
    if is_bare and "name" in tool and "function" not in tool:
        row.note(Notice("bare tool schema"))
        return {"type": "function", "function": tool}
    return tool


def read_calls(where: str, given: object) -> list[dict[str, Any]]:
    """Return calls as OpenAI has them, from those, one function, or JSON text of either."""
    if isinstance(given, str):
        given = from_text(where, given)
    calls = []
    is_one = isinstance(given, dict) and not isinstance(given.get("name", given.get("function")), list)
    for call in [given] if is_one else entries(where, given):
        if isinstance(call, str):
            call = from_text(where, call)
        if not isinstance(call, dict):
            raise ValueError(f"{where} must be a list of objects, not of {kind(call)}")
        if "name" in call and "function" not in call:
            call = {"type": "function", "function": call}
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'{where}: a call has no "function" with a "name"')
        calls.append(call)
    check_json(where, calls)
    return calls


def settled(turn: Turn, tools: tuple[Mapping[str, Any], ...], notices: list[Notice]) -> Turn:
    """Return a turn without those nulls in its calls that only fill a column of Arrow."""
    if "tool_calls" not in turn.extra:
        return turn
    return replace(
        turn, extra={"tool_calls": [settle_nulls(call, tools, notices) for call in turn.extra["tool_calls"]]}
    )
