"""What a chat template is given of a conversation: traced messages, in one of the forms that templates want.

A row is given as it is. Templates differ in what they take: arguments of calls as text or as an object, no
text as null or as "", text as a list of parts; one that fails on a form is tried with the next.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple

from megatron_dynmix.data.prepare.conversation import REASONING_KEYS, Conversation, Turn, thought
from megatron_dynmix.data.prepare.jinja import ChatTemplate
from megatron_dynmix.data.prepare.traced import ArgumentsObject, ArgumentsText, Traced, to_json, with_marks
from megatron_dynmix.files import Number, parse_json

_SCHEMA_KEYS = ("name", "description", "enum")
"""Of a schema, what templates write as it is; types and what is required they may say in their words."""

PartKind = Literal["text", "reasoning", "call", "arguments", "identifier", "schema"]


class Part(NamedTuple):
    """A text of a row, and whose: the position of its turn, -1 for a tool's schema."""

    turn: int
    kind: PartKind
    text: str


class Form(NamedTuple):
    """How what a row may say in two ways is given."""

    arguments: Literal["given", "objects", "texts"] = "given"
    empty: Literal["given", "null", "text"] = "given"
    """Whether a turn without a text, or without one beside its calls, has null or ""."""
    lists: bool = False
    """Whether texts are lists of one part."""


def forms(conversation: Conversation, template: ChatTemplate) -> Iterator[Form]:
    """Yield the forms that may differ for this conversation, first as it is given."""
    turns = conversation.turns
    has_calls = any(turn.extra.get("tool_calls") for turn in turns)
    arguments: tuple[Any, ...] = ("given", "objects", "texts") if has_calls else ("given",)
    is_bare = has_calls or any(turn.text is None for turn in turns)
    empty: tuple[Any, ...] = ("given", "null", "text") if is_bare else ("given",)
    yield from (Form(form, bare) for bare, form in product(empty, arguments))
    if template.knows("text"):
        yield Form(lists=True)


@dataclass
class Given:
    """Messages and tools for a template, and the parts that their runs are numbered by."""

    form: Form
    template: ChatTemplate
    marked: frozenset[int] = frozenset()
    """Parts with a mark on either side of them, in the place of a trace."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Any] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    numbers: dict[int, list[str]] = field(default_factory=dict)
    """By part: how the numbers are written in arguments that are an object."""

    @classmethod
    def of(
        cls,
        conversation: Conversation,
        form: Form,
        template: ChatTemplate,
        marked: frozenset[int] = frozenset(),
    ) -> "Given":
        """Return a (guarded) conversation in a form, for this template."""
        given = cls(form, template, marked)
        given.tools = [given._schema(tool) for tool in conversation.tools]
        given.messages = [given._message(at, turn) for at, turn in enumerate(conversation.turns)]
        return given

    def _part(self, turn: int, kind: PartKind, text: str) -> Traced:
        number = len(self.parts)
        self.parts.append(Part(turn, kind, text))
        return Traced(with_marks(text, number)) if number in self.marked else Traced.part(text, number)

    def _message(self, at: int, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role}
        calls = turn.extra.get("tool_calls")
        content: Any = None if turn.text is None else self._part(at, "text", turn.text)
        if turn.reasoning is not None:
            reasoning = self._part(at, "reasoning", turn.reasoning)
            names = [key for key in REASONING_KEYS if self.template.knows(key)]
            message |= dict.fromkeys(names, reasoning)
            # beside a null there is no place for it but a key of its own
            if not names and (content or not calls or self.form.empty != "null"):
                content = thought(reasoning, content or "")
        if not content and (content is None or calls):
            content = {"given": content, "null": None, "text": ""}[self.form.empty]
        if self.form.lists and content is not None:
            content = [{"type": "text", "text": content}]
        message["content"] = content
        for key, value in turn.extra.items():
            message[key] = self._part(at, "identifier", value) if isinstance(value, str) else value
        if calls:
            message["tool_calls"] = [self._call(at, call) for call in calls]
        return message

    def _call(self, at: int, call: Mapping[str, Any]) -> dict[str, Any]:
        traced = {
            key: self._part(at, "identifier", value) if key == "id" and isinstance(value, str) else value
            for key, value in call.items()
        }
        function = dict(call["function"])
        function["name"] = self._part(at, "call", function["name"])
        if "arguments" in function:
            function["arguments"] = self._arguments(at, function["arguments"])
        return {**traced, "function": function}

    def _arguments(self, at: int, arguments: Any) -> Any:
        is_text = isinstance(arguments, str)
        read = _object_of(arguments) if is_text else arguments
        if self.form.arguments == "texts" and not is_text:
            arguments, is_text = to_json(arguments), True
        elif self.form.arguments == "objects" and isinstance(read, dict):
            arguments, is_text = read, False
        if is_text:
            part = self._part(at, "arguments", arguments)
            return ArgumentsText.of(part, part.runs) if isinstance(read, dict) else part
        if not isinstance(arguments, dict):
            return self._values(at, arguments)
        traced = ArgumentsObject(self._values(at, arguments))
        traced.part = len(self.parts)
        self._part(at, "arguments", "")
        self.numbers[traced.part] = list(_numbers(arguments))
        return traced

    def _values(self, at: int, value: Any) -> Any:
        if isinstance(value, str):
            return self._part(at, "arguments", value)
        if isinstance(value, dict):
            return {self._part(at, "arguments", key): self._values(at, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._values(at, item) for item in value]
        return value

    def _schema(self, value: Any, under: str = "") -> Any:
        if isinstance(value, str):
            return self._part(-1, "schema", value) if under in _SCHEMA_KEYS else value
        if isinstance(value, dict):
            return {
                self._part(-1, "schema", key) if under == "properties" else key: self._schema(item, key)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._schema(item, under) for item in value]
        return value


def _numbers(value: Any) -> Iterator[str]:
    """Yield how the numbers in the arguments of a call are written."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value.text if isinstance(value, Number) else json.dumps(value)


def _object_of(text: str) -> Any:
    try:
        return parse_json(text.encode(), Number)
    except ValueError:
        return None
