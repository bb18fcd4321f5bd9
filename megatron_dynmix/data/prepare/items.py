"""One JSON object of a row, read key by key, so that what nobody reads is known.

Whatever cannot be used is a ValueError with a short reason, without a location.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_dynmix.data.prepare.conversation import REASONING_KEYS
from megatron_dynmix.data.prepare.notices import Notice
from megatron_dynmix.data.prepare.structs import Struct
from megatron_dynmix.files import Number, parse_json

UNUSED = {
    **dict.fromkeys(("image", "images"), "pictures"),
    **dict.fromkeys(("audio", "audios", "video", "videos"), "sound or film"),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), "a preference"),
    **dict.fromkeys(("kto_tag", "label", "score", "reward"), "a judgement"),
    **dict.fromkeys(("weight", "train", "loss", "loss_scale", "mask", "masked"), "a weight of the whole"),
    **dict.fromkeys(REASONING_KEYS, "reasoning that is not an answer's"),
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id"), "calls that are not an answer's"),
    **dict.fromkeys(("enable_thinking", "reasoning_effort"), "an argument of chat_template_kwargs"),
    **dict.fromkeys(("documents", "context"), "documents to answer from"),
    **dict.fromkeys(("history", "input"), "another part of the prompt"),
    **dict.fromkeys(("channel", "recipient", "prefix", "tool_plan", "refusal"), "a part of the answer"),
    **dict.fromkeys(("training_detail", "train_detail"), "parts of a turn to train on"),
    "name": "who speaks",
}
"""Keys that other tools read, what they hold, and that are not used here where they stand."""

_MARKS = (
    *("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|start|>", "<|message|>"),
    *("<|begin_of_text|>", "<|endoftext|>", "<|turn>", "<｜User｜>", "<｜Assistant｜>", "### Response:"),
)
"""What templates write around turns: nobody says it, and it stands in a text that is templated already."""
T = TypeVar("T")


@dataclass(frozen=True)
class Names:
    """What keys and speakers are called in the rows: ours -> theirs for keys, theirs -> ours for roles."""

    fields: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


class Item:
    """A row or one of its turns: ``where`` names it in reasons, ``notices`` are those of the whole row.

    Keys are asked for by our names.
    """

    def __init__(self, where: str, value: object, names: Names, notices: list[Notice]) -> None:
        if not isinstance(value, dict):
            raise ValueError(
                f"{where or 'a row'} must be {'an' if where else 'a JSON'} object, not {kind(value)}"
            )
        self.where, self.names, self.notices = where, names, notices
        self._value = value
        self._read: set[str] = set()

    def __len__(self) -> int:
        return len(self._value)

    def __contains__(self, key: str) -> bool:
        """Tell whether it has one of our keys, under whatever name; null counts."""
        return self.names.fields.get(key, key) in self._value

    def first_of(self, *keys: str) -> str:
        """Return the first of our keys that it has, or the first of all."""
        for key in keys:
            if key in self:
                return key
        return keys[0]

    def at(self, key: str) -> str:
        """Return how a reason names a key."""
        name = self.names.fields.get(key, key)
        return f'{self.where}: "{name}"' if self.where else f'"{name}"'

    def get(self, key: str) -> Any:
        """Return what stands under a key, None for nothing; it counts as read."""
        name = self.names.fields.get(key, key)
        self._read.add(name)
        return self._value.get(name)

    def some(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """Return what stands under any of several keys, which have no other names; null is nothing."""
        if self._value.keys().isdisjoint(keys):
            return {}
        self._read.update(keys)
        return {key: value for key in keys if (value := self._value.get(key)) is not None}

    def need(self, key: str) -> Any:
        """Return what stands under a key that must be there; null does, in a column of structs too."""
        name = self.names.fields.get(key, key)
        if name not in self._value and not (isinstance(self._value, Struct) and name in self._value.nulls):
            has_no = f"{self.where} has no key" if self.where else "no key"
            raise ValueError(f'{has_no} "{name}"')
        return self.get(key)

    def string(self, key: str) -> str:
        """Return a text that must be there."""
        value = self.need(key)
        # most are plain; where they stand is worked out for the others only
        return value if isinstance(value, str) and value.isascii() else string(self.at(key), value)

    def text(self, key: str) -> str:
        """Return a text that must be there and not be blank."""
        text = self.string(key)
        if not text.strip():
            raise ValueError(f"{self.at(key)} is empty")
        self.note_marks(text)
        return text

    def note(self, notice: Notice) -> None:
        """Keep in mind what a user should know."""
        self.notices.append(notice)

    def note_marks(self, text: str) -> None:
        """Note that a text is templated already."""
        if "<|" in text or "<｜" in text or "INST]" in text or "_of_turn>" in text or "### R" in text:
            self.notices.extend(Notice("templated text", mark) for mark in _MARKS if mark in text)

    def note_unread(self) -> None:
        """Note the keys that hold something and that nobody has read."""
        of = " of a turn" if self.where else ""
        for key, value in self._value.items():
            if key in self._read or value is None or value in ("", [], {}):
                continue
            if key in UNUSED:
                self.note(Notice("unused key", f"{key}{of} ({UNUSED[key]})"))
            else:
                self.note(Notice("unknown key", f"{key}{of}"))


def string(where: str, value: object) -> str:
    """Return a text that a tokenizer takes."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, not {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # legal in JSON as \ud800, but no tokenizer takes it
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start}") from error
    return value


def kind(value: object) -> str:
    """Return how JSON calls a value's type."""
    if isinstance(value, dict):
        return "an object"
    names = {
        **{list: "a list", str: "a string", bool: "a boolean", type(None): "null"},
        bytes: "bytes (a binary column: write it as text)",
    }
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def from_text(where: str, text: str) -> Any:
    """Return the value of JSON that stands in a string."""
    try:
        return parse_json(string(where, text).encode(), Number)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_json(where: str, value: object) -> None:
    """Refuse what no template can write: Arrow has types that JSON has not, JSON has half surrogates."""
    try:
        string(where, json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def entries(where: str, value: object, of: str = "objects") -> list[Any]:
    """Return the items of a list, of JSON text that is one, or of lists by key (`datasets.Sequence`)."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = from_text(where, value)
    if isinstance(value, dict) and value and all(isinstance(items, list) for items in value.values()):
        lengths = {len(items) for items in value.values()}
        if len(lengths) > 1:
            raise ValueError(f"{where} holds lists of different lengths; write it as a list of objects")
        value = [
            {key: item for key, item in zip(value, items, strict=True) if item is not None}
            for items in zip(*value.values(), strict=True)
        ]
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of {of}, not {kind(value)}")
    return value


def only(where: str, given: Mapping[str, T]) -> T | None:
    """Return the one thing that several keys say, None if there is none; two that differ are refused."""
    first = next(iter(given.values()), None)
    if any(other != first for other in given.values()):
        raise ValueError(f"{where}: {' and '.join(map(repr, given))} say different things; keep one")
    return first
