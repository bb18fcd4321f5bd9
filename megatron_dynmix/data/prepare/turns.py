"""The turns of a chat, in the shapes that OpenAI, ShareGPT and the tools that train on them give a turn.

What cannot be one is a ValueError with a short reason, without a location.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from megatron_dynmix.config.run_config import Speaker
from megatron_dynmix.data.prepare.conversation import REASONING_KEYS, Turn
from megatron_dynmix.data.prepare.items import Item, check_json, entries, kind, only, string
from megatron_dynmix.data.prepare.notices import Notice
from megatron_dynmix.data.prepare.tools import read_calls

OPENAI, SHAREGPT = ("role", "content"), ("from", "value")
"""The keys of a turn: who says it, and what."""
ROLES: Mapping[str, Speaker] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
_ANSWERS = ("assistant", "function_call")
_THOUGHT = re.compile(r"\s*(?:<think>(.*?)</think>\s*)?(.*)", re.DOTALL)
"""Reasoning, if there is some, and the calls after it."""
_MASKS = ("mask", "masked")
_FLAGS = ("weight", "train", "trainable", "loss", "loss_scale", *_MASKS)
_RESULT_OF = ("tool_call_id", "name")
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_turns(row: Item, key: str, keys: tuple[str, str]) -> list[Turn]:
    """Return the turns in a list under a key of a row; each has these keys, or those of the other shape."""
    turns: list[Turn] = []
    for number, value in enumerate(entries(row.at(key), row.need(key), "turns"), start=1):
        item = Item(f"turn {number}", value, row.names, row.notices)
        turn, is_call = _turn(item, keys)
        item.note_unread()
        if is_call and turns and turns[-1].role == "assistant":
            turns[-1] = _joined(turns[-1], turn, item.where)
        else:
            turns.append(turn)
    if not turns:
        raise ValueError(f"{row.at(key)} is empty")
    return turns


def _turn(item: Item, keys: tuple[str, str]) -> tuple[Turn, bool]:
    """Return a turn, and whether it is one of ShareGPT's `function_call`, part of the answer before it."""
    who, says = map(item.first_of, keys, OPENAI, SHAREGPT)
    speaker = _speaker(item, who)
    # most turns have these two keys, and there is nothing to look for
    has_more = len(item) > 2 or says not in item
    is_trained = _is_trained(item, speaker) if has_more else None
    reasoning = read_reasoning(item) if has_more and speaker in _ANSWERS else None
    if speaker == "function_call":
        thought, call = _THOUGHT.fullmatch(item.text(says)).groups()  # type: ignore[union-attr]
        extra = {"tool_calls": read_calls(item.at(says), call)}
        return Turn("assistant", None, extra, _one_of(item.where, reasoning, thought), is_trained), True
    extra = _extra(item, speaker) if has_more else {}
    text = thought = None
    content = item.get(says) if "tool_calls" in extra else item.need(says)
    if isinstance(content, str):
        text = item.string(says)
    elif content is not None or (speaker != "tool" and "tool_calls" not in extra):
        text, thought = _parts(item.at(says), content)
        if thought is not None and speaker != "assistant":
            raise ValueError(f"{item.at(says)} holds reasoning, but the {speaker} speaks")
    if text is not None:
        item.note_marks(text)
        if speaker in ("user", "assistant") and not extra and not text.strip():
            raise ValueError(f"{item.where}: the {speaker}'s text is empty")
    return Turn(speaker, text, extra, _one_of(item.where, reasoning, thought), is_trained), False


def _speaker(item: Item, key: str) -> Speaker:
    given = item.string(key)
    role = item.names.roles.get(given) or ROLES.get(given)
    if role is None:
        known = ", ".join((*ROLES, *item.names.roles))
        raise ValueError(
            f"{item.where}: unknown role {given!r} (known: {known}); say who it is: "
            f"roles: {{{given or repr(given)}: {ROLES.get(given.lower(), 'assistant')}}}"
        )
    return cast(Speaker, role)


def _is_trained(item: Item, speaker: Speaker) -> bool | None:
    """Return whether the row says that a turn is trained on, by whatever key."""
    given, flags = item.some(_FLAGS), {}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{item.at(key)} is {value!r}; a turn is trained on or not: use 0 or 1")
        flags[key] = bool(value) != (key in _MASKS)
    is_trained = only(item.where, flags) if given else None
    if speaker in _ANSWERS:
        return is_trained
    if is_trained:
        item.note(Notice("unused training flag", f"of a {speaker} turn"))
    return None


def read_reasoning(item: Item) -> str | None:
    """Return the reasoning of an answer, under whichever of its names."""
    given = {key: string(item.at(key), value) for key, value in item.some(REASONING_KEYS).items()}
    return only(item.where or "row", given) if given else None


def _parts(where: str, content: object) -> tuple[str, str | None]:
    """Return the text of a turn that comes in parts, and the reasoning among them."""
    if not isinstance(content, list | dict):
        return string(where, content), None
    texts, thoughts = [], []
    for number, part in enumerate(entries(where, content, "parts"), start=1):
        at = f"{where}: part {number}"
        if not isinstance(part, dict):
            raise ValueError(f"{at} must be an object, not {kind(part)}")
        sort = part.get("type", "text")
        if sort in _TEXT_PARTS:
            texts.append(string(at, part.get("text")))
        elif sort in ("thinking", "reasoning"):
            thoughts.append(_parts(at, part.get(sort, part.get("text")))[0])
        else:
            raise ValueError(f"{at} is of type {sort!r}, and only text can be trained on; take it out")
    return "".join(texts), "".join(thoughts) if thoughts else None


def _extra(item: Item, speaker: Speaker) -> dict[str, Any]:
    """Return what templates are given of a turn beside its text: calls of tools, or whose result it is."""
    if speaker == "tool":
        found = item.some(_RESULT_OF)
        check_json(item.where, found)
        return found
    given = {key: value for key, value in item.some(_CALLS).items() if value}
    if not given:
        return {}
    if speaker != "assistant":
        raise ValueError(f"{item.where}: the {speaker} calls tools; only the assistant can")
    calls = only(item.where, {key: read_calls(item.at(key), value) for key, value in given.items()})
    return {"tool_calls": calls} if calls else {}


def _one_of(where: str, reasoning: str | None, more: str | None) -> str | None:
    if reasoning is not None and more is not None:
        raise ValueError(f"{where} holds reasoning twice; keep one")
    return more if reasoning is None else reasoning


def _joined(answer: Turn, call: Turn, where: str) -> Turn:
    """Return an answer with a call that follows it: together they are what the assistant says at once."""
    if answer.is_trained != call.is_trained:
        raise ValueError(f"{where} belongs to the answer before it, and only one of them is trained on")
    calls = [*answer.extra.get("tool_calls", ()), *call.extra["tool_calls"]]
    reasoning = _one_of(where, answer.reasoning, call.reasoning)
    return replace(answer, extra={"tool_calls": calls}, reasoning=reasoning)
