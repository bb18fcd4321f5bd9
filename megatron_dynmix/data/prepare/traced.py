"""Strings, and JSON of them, that know where their characters come from, whatever a chat template does.

To a template a :class:`Traced` is the very text: it compares, measures and searches the same. What is cut out
of it or joined with it keeps the origin of each character; what changes characters (``upper``) loses it.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, NamedTuple, SupportsIndex

from megatron_dynmix.data.tokenizer.special import TWIN
from megatron_dynmix.files import Number

_MARKED = re.compile(f"([{chr(TWIN)}-\U0010fffd])(.*?)\\1", re.DOTALL)
MOST_MARKS = 0x10FFFE - TWIN
"""Guards stand below, and what marks `{% generation %}` above."""

_ESCAPED = re.compile(r'[\x00-\x1f\\"]')
_ESCAPED_ASCII = re.compile(r'[^ -~]|[\\"]')
Span = tuple[int, int]
"""A half-open range of characters."""


class Run(NamedTuple):
    """Characters ``start`` to ``end`` of a text are ``source_start`` to ``source_end`` of a part.

    Where the two differ in length (an escaped character), the run cannot be cut.
    """

    start: int
    end: int
    part: int
    source_start: int
    source_end: int

    def moved(self, by: int) -> "Run":
        """Return the run in a text that stands ``by`` characters further on."""
        start, end, part, source_start, source_end = self
        return Run(start + by, end + by, part, source_start, source_end) if by else self

    def within(self, start: int, end: int) -> "Run | None":
        """Return what is left of the run in this stretch of its text, None for nothing."""
        if start <= self.start and self.end <= end:
            return self
        first, last = max(start, self.start), min(end, self.end)
        if first >= last or self.end - self.start != self.source_end - self.source_start:
            return None
        by = self.source_start - self.start
        return Run(first, last, self.part, first + by, last + by)


def runs_between(runs: Sequence[Run], start: int, end: int) -> tuple[int, int]:
    """Return the numbers of the first run that ends behind a start, and the first that is behind an end."""
    first = bisect_right(runs, start, key=lambda run: run.end)
    return first, bisect_left(runs, end, lo=first, key=lambda run: run.start)


class Traced(str):
    """A text with the runs of it whose origin is known, in order."""

    runs: tuple[Run, ...] = ()

    @classmethod
    def of(cls, text: str, runs: Iterable[Run]) -> "Traced":
        """Return a text with its runs."""
        traced = cls(text)
        traced.runs = tuple(runs)
        return traced

    @classmethod
    def part(cls, text: str, number: int) -> "Traced":
        """Return the whole of a part."""
        return cls.of(text, [Run(0, len(text), number, 0, len(text))] if text else [])

    @property
    def plain(self) -> str:
        """The text alone."""
        return str.__str__(self)

    def between(self, start: int, end: int) -> "Traced":
        """Return a stretch of the text, 0 <= start <= end <= length."""
        if start == 0 and end == len(self):
            return self
        first, behind = runs_between(self.runs, start, end)
        kept = (run.within(start, end) for run in self.runs[first:behind])
        return Traced.of(str.__getitem__(self, slice(start, end)), [run.moved(-start) for run in kept if run])

    def __str__(self) -> str:
        # what Jinja does to all that is written; it would give a plain string
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, end, step = key.indices(len(self))
            return self.between(start, max(start, end)) if step == 1 else super().__getitem__(key)
        at = range(len(self))[key]
        return self.between(at, at + 1)

    def __iter__(self) -> Iterator[str]:
        return (self[at] for at in range(len(self)))

    def __add__(self, other: str) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def strip(self, chars: str | None = None) -> str:  # noqa: D102
        return self._stripped(len(super().lstrip(chars)), len(super().rstrip(chars)))

    def lstrip(self, chars: str | None = None) -> str:  # noqa: D102
        return self._stripped(len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> str:  # noqa: D102
        return self._stripped(len(self), len(super().rstrip(chars)))

    def _stripped(self, left: int, right: int) -> "Traced":
        start = len(self) - left
        return self.between(start, max(start, right))

    def removeprefix(self, prefix: str, /) -> str:  # noqa: D102
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:  # noqa: D102
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # noqa: D102
        return self._found(super().split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # noqa: D102
        return self._found(super().rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:  # noqa: D102
        return self._found(super().splitlines(keepends), 0)

    def partition(self, sep: str, /) -> tuple[str, str, str]:  # noqa: D102
        before, found, behind = super().partition(sep)
        return self[: len(before)], found, self[len(self) - len(behind) :]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:  # noqa: D102
        before, found, behind = super().rpartition(sep)
        return self[: len(before)], found, self[len(self) - len(behind) :]

    def _found(self, pieces: list[str], gap: int) -> list[str]:
        """Return the pieces with their runs: one behind the other, by ``gap`` or by white space."""
        at, found = -gap, []
        for piece in pieces:
            start = self.index(piece, at + gap)
            at = start + len(piece)
            found.append(self[start:at])
        return found

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:  # noqa: D102
        if not old:
            return super().replace(old, new, count)
        return joined(_alternating(new, self.split(old, count)))

    def join(self, pieces: Iterable[str], /) -> str:  # noqa: D102
        return joined(_alternating(self, list(pieces)))


def _alternating(separator: str, pieces: list[str]) -> Iterator[str]:
    return chain(*((separator, piece) if at else (piece,) for at, piece in enumerate(pieces)))


def joined(pieces: Iterable[str]) -> str:
    """Return the pieces as one text, traced if one of them is."""
    kept = list(pieces)
    runs: list[Run] = []
    length = 0
    for piece in kept:
        if piece.__class__ is not str:
            runs += [run.moved(length) for run in getattr(piece, "runs", ())]
        length += len(piece)
    text = "".join(kept)
    return Traced.of(text, runs) if runs else text


def traced(value: Any) -> Traced:
    """Return a text as a traced one, of which nothing need be known."""
    return value if isinstance(value, Traced) else Traced(value)


def with_marks(text: str, number: int) -> str:
    """Return a part with one private character on either side, inside its white space."""
    said = text.strip()
    mark = chr(TWIN + number)
    return text.replace(said, f"{mark}{said}{mark}", 1)


def without_marks(text: Traced, parts: Sequence[str]) -> Traced:
    """Return a text without marks, and what was between those of a part as a run of that."""
    pieces, at = [], 0
    for match in _MARKED.finditer(text):
        number = ord(match[1]) - TWIN
        said = parts[number].strip()
        start = parts[number].index(said)
        # what a template has made other characters of stands in its place, but is not what was given
        end = start + len(said) if match[2] in (said, json.dumps(said, ensure_ascii=False)[1:-1]) else start
        run = Run(0, len(match[2]), number, start, end)
        pieces += [text.between(at, match.start()), Traced.of(match[2], [run])]
        at = match.end()
    return traced(joined((*pieces, text.between(at, len(text)))))


class ArgumentsObject(dict[str, Any]):
    """The arguments of a call as an object: a template must write them key by key, or as JSON."""

    part: int
    """What all of its JSON belongs to, brackets and numbers too."""


class ArgumentsText(Traced):
    """The arguments of a call as the text of a JSON object: in quotes they would be another thing."""


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Do as `json.dumps` does; Jinja's own filter escapes what is special in HTML."""
    newline = f"\n{' ' * indent if isinstance(indent, int) else indent}" if indent is not None else ""
    between, colon = separators or ("," if newline else ", ", ": ")
    writer = _Writer(ensure_ascii, newline, between, colon, sort_keys)
    return joined(writer.pieces(value, "\n" if newline else ""))


class _Writer:
    def __init__(self, ascii_only: bool, newline: str, between: str, colon: str, sort_keys: bool) -> None:
        self.encode = encode_basestring_ascii if ascii_only else encode_basestring
        self.escaped = _ESCAPED_ASCII if ascii_only else _ESCAPED
        self.indent, self.between, self.colon, self.sort_keys = newline[1:], between, colon, sort_keys

    def pieces(self, value: Any, newline: str) -> Iterator[str]:
        """Yield the JSON of a value; ``newline`` is what begins a line of what contains it, "" for none."""
        if isinstance(value, str):
            yield self._string(value)
        elif isinstance(value, Number):
            yield value.text
        elif isinstance(value, ArgumentsObject):
            text = joined(self._object(value, newline))
            yield _filled(traced(text), value.part)
        elif isinstance(value, dict):
            yield from self._object(value, newline)
        elif isinstance(value, list | tuple):
            yield from self._container(
                "[]", (self.pieces(item, newline + self.indent) for item in value), newline
            )
        else:
            yield json.dumps(value)

    def _object(self, value: dict[Any, Any], newline: str) -> Iterator[str]:
        items = sorted(value.items()) if self.sort_keys else value.items()
        inner = newline + self.indent
        yield from self._container("{}", (self._item(key, item, inner) for key, item in items), newline)

    def _item(self, key: Any, value: Any, newline: str) -> Iterator[str]:
        # of a key that is no string, json makes one
        yield self._string(key if isinstance(key, str) else json.dumps(key))
        yield self.colon
        yield from self.pieces(value, newline)

    def _container(self, brackets: str, items: Iterator[Iterator[str]], newline: str) -> Iterator[str]:
        yield brackets[0]
        is_empty = True
        for item in items:
            yield f"{'' if is_empty else self.between}{newline and newline + self.indent}"
            yield from item
            is_empty = False
        yield f"{'' if is_empty else newline}{brackets[1]}"

    def _string(self, value: str) -> str:
        if isinstance(value, ArgumentsText):
            raise ValueError("it writes the arguments of a call, which are JSON, in quotes")
        written = self.encode(value)
        if not isinstance(value, Traced):
            return written
        if len(written) == len(value) + 2:
            return joined(('"', value, '"'))
        pieces, at = ['"'], 0
        for match in self.escaped.finditer(value):
            escape = self.encode(match[0])[1:-1]
            runs = value.between(*match.span()).runs
            pieces += [
                value[at : match.start()],
                Traced.of(escape, (run._replace(end=len(escape)) for run in runs)),
            ]
            at = match.end()
        return joined((*pieces, value[at:], '"'))


def _filled(text: Traced, part: int) -> Traced:
    """Give what is between the runs of a text to a part, of which it holds nothing."""
    runs, at = [], 0
    for run in (*text.runs, Run(len(text), len(text), part, 0, 0)):
        if at < run.start:
            runs.append(Run(at, run.start, part, 0, 0))
        runs.append(run)
        at = run.end
    return Traced.of(text, runs[:-1])
