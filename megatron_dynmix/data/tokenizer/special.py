"""Special tokens, and how a text that only looks like one is kept apart from them.

While a conversation is rendered, each literal special token in what people wrote is one private character
(its *guard*), so that every special token left in the rendered text is the template's own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.errors import InputError

GUARD = 0x108000
TWIN = 0x10C000
"""First characters of two ranges at the end of Unicode's private use; a token's number is added."""
_MOST = TWIN - GUARD
# up to the very end: the last two characters mark what an answer is in jinja.py
_PRIVATE = re.compile(f"[{chr(GUARD)}-{chr(0x10FFFF)}]")


class TextPiece(NamedTuple):
    """A part of a guarded text: where it stands there, what it says, and whether it is a special token."""

    start: int
    end: int
    text: str
    is_special: bool = False


class SpecialTokens:
    """The special tokens of one tokenizer."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        if len(ids) > _MOST:
            raise InputError(
                f"the tokenizer has {len(ids)} special tokens, more than {_MOST}; use another one"
            )
        self.ids = dict(ids)
        self.texts = tuple(ids)
        self._heads = tuple({text[:2] for text in self.texts})
        self._guards = {text: chr(GUARD + number) for number, text in enumerate(self.texts)}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # the longest first: where one token starts like another, tokenizers take the longer
        return re.compile("|".join(map(re.escape, sorted(self.texts, key=len, reverse=True))) or r"(?!)")

    def guard(self, text: str) -> str:
        """Return what somebody wrote, with each literal special token as its guard.

        A text that holds characters that are used for guards is a ValueError.
        """
        if not text.isascii() and (found := _PRIVATE.search(text)):
            raise ValueError(
                f"holds the private character U+{ord(found[0]):X}, which is in use here; remove it"
            )
        if not any(head in text for head in self._heads):
            return text
        return self._pattern.sub(lambda match: self._guards[match[0]], text)

    def guard_json(self, value: Any) -> Any:
        """Return a JSON value with all strings in it guarded, keys too."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, Mapping):
            return {self.guard(key): self.guard_json(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard_json(item) for item in value]
        return value

    def is_guarded(self, text: str) -> bool:
        """Tell whether a text holds guards."""
        return not text.isascii() and _PRIVATE.search(text) is not None

    def literal(self, text: str) -> Sequence[str]:
        """Return the special tokens that a guarded text only spells, each once."""
        if text.isascii():
            return ()
        return [self.texts[ord(guard) - GUARD] for guard in dict.fromkeys(_PRIVATE.findall(text))]

    def unguard(self, text: str) -> str:
        """Return the text as people would read it: guards are what they stand for."""
        # past the guards are what marks answers while a template works, which is not there for people
        return _PRIVATE.sub(lambda match: "".join(self.texts[ord(match[0]) - GUARD :][:1]), text)

    def pieces(self, text: str) -> Iterator[TextPiece]:
        """Cut a guarded text at its special tokens and guards; nothing is left out."""
        end = 0
        for match in re.finditer(f"{self._pattern.pattern}|{_PRIVATE.pattern}", text):
            if match.start() > end:
                yield TextPiece(end, match.start(), text[end : match.start()])
            end = match.end()
            is_guard = _PRIVATE.match(match[0]) is not None
            said = self.texts[ord(match[0]) - GUARD] if is_guard else match[0]
            yield TextPiece(match.start(), end, said, is_special=not is_guard)
        if end < len(text):
            yield TextPiece(end, len(text), text[end:])


def join_pieces(pieces: Sequence[TextPiece], texts: Sequence[str]) -> tuple[str, NDArray[np.int64]]:
    """Join what is written for consecutive pieces, and say where its characters stand in the guarded text.

    The second result has one position more than there are characters: the end.
    """
    origins = [
        # what takes more room than the guard that it is written for all stands where that does
        np.minimum(np.arange(piece.start, piece.start + len(text)), piece.end - 1)
        for piece, text in zip(pieces, texts, strict=True)
    ]
    return "".join(texts), np.concatenate([*origins, [pieces[-1].end]])
