"""Strict reading of JSON Lines files: one JSON value per line, nothing guessed, nothing lost."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from megatron_dynmix.errors import InputError

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16 = "UTF-16 or UTF-32 text; convert it: iconv -f UTF-16 -t UTF-8"
_FOREIGN_STARTS = {
    b"\x1f\x8b": "gzip-compressed; decompress it: gunzip",
    b"PK\x03\x04": "a zip archive; extract it: unzip",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; decompress it: unzstd",
    b"\xfd7zXZ": "xz-compressed; decompress it: unxz",
    b"PAR1": "Parquet; export it as JSON Lines",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"{\x00": _UTF16,
    b"\x00{": _UTF16,
    b"\x00\x00": _UTF16,
}


@dataclass(frozen=True)
class BadLine:
    """A line that holds no valid JSON value: its number (from 1) and why."""

    line: int
    reason: str


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any | BadLine]]:
    r"""Yield ``(line_number, value)`` for every non-blank line of a UTF-8 JSON Lines file.

    Lines end at ``\n`` only (texts may hold U+2028 and the like); ``\r\n`` and a leading byte order
    mark are accepted. A line that is not strict JSON (NaN, Infinity, the same key twice, bad UTF-8)
    comes as a :class:`BadLine` in its place. Line numbers start at 1 and count blank lines.

    Raises:
        InputError: the file as a whole cannot be read as JSON Lines: missing, compressed, not UTF-8,
            one JSON array, or without a single non-blank line (known only at its end).

    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            yield from _rows(path, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give an existing JSONL file") from error


def _rows(path: Path, file: BufferedReader) -> Iterator[tuple[int, Any | BadLine]]:
    head = file.peek(8)
    for start, remedy in _FOREIGN_STARTS.items():
        if head.startswith(start):
            raise InputError(f"{path}: not a JSONL file but {remedy}")
    found = False
    for number, raw in enumerate(file, start=1):
        if number == 1:
            raw = raw.removeprefix(_UTF8_BOM)
        raw = raw.strip(b" \t\r\n")
        if not raw:
            continue
        if not found and raw.startswith(b"["):
            raise InputError(
                f"{path}:{number}: a JSON array, not JSON Lines; write one object per line: jq -c '.[]'"
            )
        found = True
        yield number, _parse(number, raw)
    if not found:
        raise InputError(f"{path}: holds no rows; give a JSONL file with one conversation per line")


def _parse(number: int, raw: bytes) -> Any | BadLine:
    try:
        return json.loads(
            raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except UnicodeDecodeError as error:
        return BadLine(number, f"not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return BadLine(number, f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadLine(number, "not usable: nested too deeply")
    except ValueError as error:
        return BadLine(number, f"not strict JSON: {error}")


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
