"""Strict reading of JSON: one value per line, or the items of one array; nothing guessed, nothing lost."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_dynmix.errors import InputError

UTF8_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_CHUNK_BYTES = 1 << 20
_MAX_ROW_BYTES = 1 << 28
"""A row larger than this is a file without line ends, or a quote that is never closed."""
_IN_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_OUTSIDE = re.compile(rb'["{}\[\],]')


def split_lines(file: IO[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    r"""Yield ``(line_number, line)`` of every non-blank line, without the space around it.

    Lines end at ``\n`` only (texts may hold U+2028 and the like); ``\r\n`` and a leading byte order
    mark are accepted. Numbers start at 1 and count blank lines.

    Raises:
        InputError: a line is too long to be a row; ``name`` is how the message calls the file.

    """
    number = 0
    while raw := file.readline(_MAX_ROW_BYTES):
        number += 1
        if number == 1:
            raw = raw.removeprefix(UTF8_BOM)
        if len(raw) >= _MAX_ROW_BYTES:
            raise InputError(f"{name}:{number}: {_too_long()}; end every row with a newline")
        if raw := raw.strip(_SPACE):
            yield number, raw


def split_array(file: IO[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    """Yield ``(item_number, item)``, numbers from 1, for the bytes of each item of one JSON array.

    Only brackets, commas and quotes are looked at, so that an item that is no JSON spoils no other.

    Raises:
        InputError: the array does not end, or something follows it.

    """
    scanner = _ArrayScanner(file, name)
    number = 0
    for raw in scanner.items():
        number += 1
        yield number, raw
    if scanner.rest():
        raise InputError(
            f"{name}: something follows the array after item {number}; a .json file may hold one array, or "
            "one JSON object per line"
        )


class _ArrayScanner:
    """Cuts the text of an array into items; holds one chunk and the item under way."""

    def __init__(self, file: IO[bytes], name: object) -> None:
        self.file = file
        self.name = name
        self.buffer = b""
        self.position = 0
        self.number = 1

    def items(self) -> Iterator[bytes]:
        opening = self._until_not_space()
        assert opening == b"[", "the caller looked"
        depth, start, seen = 0, self.position, False
        while True:
            mark = self._next(start)
            if mark is None:
                raise InputError(
                    f"{self.name}: item {self.number}: the file ends inside the array; it is cut off, or a "
                    "quote or bracket is not closed"
                )
            sign, at, start = mark
            if sign in b"{[":
                depth += 1
            elif depth and sign in b"}]":
                depth -= 1
            elif not depth and sign in b",]":
                item = self.buffer[start:at].strip(_SPACE)
                if item or sign == b"," or seen:
                    yield item
                    self.number += 1
                seen = True
                if sign == b"]":
                    return
                start = self.position
            elif not depth and sign == b"}":
                raise InputError(
                    f"{self.name}: item {self.number}: a closing brace that nothing opened; correct the file"
                )

    def rest(self) -> bytes:
        """Return the first byte behind the array that is no space, or nothing."""
        return self._until_not_space()

    def _next(self, start: int) -> tuple[bytes, int, int] | None:
        """Return the next sign outside strings, where it is, and where ``start`` is now; None at the end."""
        while True:
            found = _OUTSIDE.search(self.buffer, self.position)
            if found is None:
                self.position = len(self.buffer)
                if not self._more(start):
                    return None
                start = 0
                continue
            if found[0] != b'"':
                self.position = found.end()
                return found[0], found.start(), start
            while True:
                end = _IN_STRING.match(self.buffer, found.end()).end()  # type: ignore[union-attr]
                if self.buffer[end : end + 1] == b'"':
                    self.position = end + 1
                    break
                shift = start
                self.position = found.end()
                if not self._more(start):
                    return None
                found = _OUTSIDE.search(self.buffer, found.start() - shift)
                assert found is not None, "the quote is still there"
                start = 0

    def _more(self, start: int) -> bool:
        """Read on, and forget what stands before ``start``; positions count from there then."""
        size = len(self.buffer) - start
        if size >= _MAX_ROW_BYTES:
            raise InputError(
                f"{self.name}: item {self.number}: {_too_long()}; a quote or bracket is not closed"
            )
        # as much again as the item has already, so that a long one is not scanned often
        chunk = self.file.read(max(_CHUNK_BYTES, size))
        self.buffer = self.buffer[start:] + chunk
        self.position -= start
        return bool(chunk)

    def _until_not_space(self) -> bytes:
        while True:
            while self.position < len(self.buffer):
                sign = self.buffer[self.position : self.position + 1]
                self.position += 1
                if sign not in _SPACE:
                    return sign
            self.buffer, self.position = self.file.read(_CHUNK_BYTES), 0
            if not self.buffer:
                return b""


def parse_json(raw: bytes) -> Any:
    """Return the value of one JSON text.

    Raises:
        ValueError: not strict JSON (NaN, Infinity, the same key twice, bad UTF-8); a short reason.

    """
    try:
        return json.loads(
            raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not strict JSON: {error}") from None


def read_json(path: Path) -> Any:
    """Return the value of a file that holds one JSON text.

    Raises:
        InputError: there is no such file, it cannot be read, or it is not strict JSON.

    """
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys without a word; half of a row would be lost
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return members


def _too_long() -> str:
    return f"longer than {_MAX_ROW_BYTES >> 20} MiB"
