"""Records of a run as they are found: what cannot be read is said, left out, and nothing else is lost.

The other readers of these files refuse what is broken, because they prove or resume; a report has to show
a run that was killed, or goes on while it is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

CHUNK_BYTES = 1 << 24
Say = Callable[[str], None]


def count_lines(path: Path) -> int:
    """Whole lines of a file; 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))


def read_lines(path: Path, say: Say) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file in order, one in memory at a time.

    Args:
        path: the file; it may be missing.
        say: told once of each kind of thing that was left out.

    """
    if not path.is_file():
        say(f"{path.name} is missing")
        return
    broken, found, place = [], 0, 0
    with path.open("rb") as file:
        for place, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                say(
                    f"{path.name}: line {place}, the last, is incomplete: the run is writing it, or was "
                    "killed as it did; it is left out"
                )
                break
            record = _parse(line)
            if record is None:
                broken.append(place)
            else:
                found += 1
                yield record
    if broken:
        what = (
            f"line {broken[0]} is" if len(broken) == 1 else f"{len(broken)} lines, the first {broken[0]}, are"
        )
        say(f"{path.name}: {what} no record with an iteration; left out")
    if not place:
        say(f"{path.name} is empty")
    elif not found:
        say(f"{path.name} holds no whole record")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(record, dict) or type(record.get("iteration")) is not int:
        return None
    return record


def number(value: Any) -> float:
    """A recorded number; NaN for what is none. Records write NaN and infinities as strings."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


def by_source(values: Any, sources: Any) -> dict[str, float]:
    """Values of a record by name of the source; empty where it has none, or not one for each."""
    if isinstance(values, Mapping):
        return {str(name): number(value) for name, value in values.items()}
    if not _is_list(values) or not _is_list(sources) or len(values) != len(sources):
        return {}
    return {str(name): number(value) for name, value in zip(sources, values, strict=True)}


def _is_list(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str)


def thinned(length: int, most: int) -> list[int]:
    """At most `most` of the places 0 ... length - 1, evenly spread, the first and the last among them."""
    if length <= most:
        return list(range(length))
    return [round(place * (length - 1) / (most - 1)) for place in range(most)]
