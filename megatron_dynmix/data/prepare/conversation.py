"""A conversation: an optional system turn, then user and assistant by turns, an answer last.

What cannot be one is a ValueError with a short reason, without a location.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from megatron_dynmix.data.prepare.notices import Notice

_CALLS_IN_TEXT = ("<tool_call>", "<function", "[TOOL_CALLS]", "<|python_tag|>")
"""What stands in answers whose calls of tools are written out as a template would."""
Role = Literal["system", "user", "assistant", "tool", "text"]

THINK, END_THINK = "<think>", "</think>"
"""What models write around reasoning that have no other place for it."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""What rows and templates call the reasoning of an answer."""


@dataclass(frozen=True)
class Turn:
    """What one speaker says at once.

    ``text`` is None where the row has null. ``extra`` holds the keys of tool calls and results as they were
    given: the ``arguments`` of a call are an object or a string. ``reasoning`` comes before the text.
    """

    role: Role
    text: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    reasoning: str | None = None
    is_trained: bool | None = None
    """Whether the row itself says that an answer is trained on; None leaves it to `train_on`."""


@dataclass(frozen=True)
class Conversation:
    """Turns in order: at most one system turn, then user and assistant alternating, assistant last.

    An assistant turn with tool calls is followed by tool turns, then by the assistant again. A row of
    plain text is a single turn of the role ``text``. ``tools`` are JSON schemas, ``template_kwargs`` what
    the row gives to the chat template beside them. Numbers in all of them are `files.Number` where they
    were written with a fraction or an exponent.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[Notice, ...] = ()


def thought(reasoning: str, text: str) -> str:
    """Return a text behind its reasoning."""
    return f"{THINK}\n" + reasoning + f"\n{END_THINK}\n\n" + text


def check_order(turns: Sequence[Turn]) -> None:
    """Refuse turns that are in no order in which people and assistants speak, or that train nothing."""
    roles = [turn.role for turn in turns]
    if roles.count("system") > 1:
        raise ValueError("more than one system prompt; write them as one")
    if "system" in roles[1:]:
        raise ValueError("the system turn is not the first")
    if roles[:1] == ["system"]:
        turns, roles = turns[1:], roles[1:]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so nothing to train on")
    if roles[0] != "user":
        raise ValueError(
            f"starts with {'an' if roles[0] == 'assistant' else 'a'} {roles[0]} turn; what comes before the "
            "user may stand in the system prompt"
        )
    for earlier, later in pairwise(turns):
        _check_pair(earlier, later)
    if roles[-1] == "user":
        raise ValueError("ends with a user turn that has no answer")
    if roles[-1] == "tool":
        raise ValueError("ends with a tool's result that has no answer")
    if all(turn.is_trained is False for turn in turns if turn.role == "assistant"):
        raise ValueError("every answer says that it is not trained on, so nothing is")


def _check_pair(earlier: Turn, later: Turn) -> None:
    is_call = bool(earlier.extra.get("tool_calls"))
    if later.role == "tool":
        is_call = is_call or any(mark in (earlier.text or "") for mark in _CALLS_IN_TEXT)
        if earlier.role != "tool" and not (is_call and earlier.role == "assistant"):
            raise ValueError(
                f"a tool's result after the {earlier.role}'s turn, where no tool was called; write the call "
                "as tool_calls of the assistant"
            )
    elif is_call:
        raise ValueError(
            f"tool calls are followed by the {later.role}, not by a tool's result; give each result as a "
            "turn of the role tool"
        )
    elif earlier.role == later.role:
        raise ValueError(f"two {later.role} turns in a row; write them as one")
    elif (earlier.role, later.role) == ("tool", "user"):
        raise ValueError(
            "a tool's result is followed by the user, not by the assistant; write what the assistant said"
        )
