"""Append-only JSONL files of records that each carry their `iteration`: written, cut, read, and salvaged."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_dynmix.errors import InputError, TrainingStopped
from megatron_dynmix.files import why_not_written, write_atomically
from megatron_dynmix.records.schema import AnyLine, Line

CHUNK_BYTES = 1 << 24
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around what writes records: `TrainingStopped` names the file or folder that the disk did not take."""
    try:
        yield
    except OSError as error:
        why = why_not_written(error, path)
        raise TrainingStopped(
            f"{path} cannot be written ({why}); make room, and a run that has stopped goes on with "
            "--resume auto"
        ) from error


class RecordFile:
    """A file of records that grows; a failure to write names it."""

    def __init__(self, path: Path, mode: Literal["ab", "r+b"]) -> None:
        self._path = path
        self._file = path.open(mode)

    def add(self, data: bytes) -> None:
        """Append data, which a kill of this process can then no longer lose."""
        with naming(self._path):
            self._file.write(data)
            self._file.flush()

    def flush(self) -> None:
        """Hand the file to the disk, for instance before a checkpoint counts as saved."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; writing is an error from then on."""
        with naming(self._path):
            self._file.close()


class JsonlWriter(RecordFile):
    """One JSON object per line, flushed as it is written, so that a kill loses at most the line in hand.

    An existing file is continued: a last line that a kill cut short is cut off, and with `keep_until`
    every record of a later iteration too, because a resumed run will write those iterations again. The
    file is replaced atomically. Raises `InputError` where any other line is not a record, `TrainingStopped`
    where it cannot be written.
    """

    def __init__(self, path: Path, *, keep_until: int | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut(path, keep_until)
        super().__init__(path, "ab")

    def write(self, record: Line) -> None:
        """Append one record."""
        self.add(f"{json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False)}\n".encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return all whole records of a file; a last line that a kill cut short is left out, with a warning.

    `InputError` names file and line of another that is not a JSON object with an integer `iteration`.
    """
    return [record for _, record in _read(path)]


def read_lines(path: Path, kind: type[AnyLine]) -> list[AnyLine]:
    """Return all whole records of a file of one kind; refuse others, see `read_records`."""
    lines = []
    for number, (_, record) in enumerate(_read(path), start=1):
        try:
            lines.append(kind.from_json(record))
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: not a {kind.__name__} ({error}). Mend or remove the line."
            ) from None
    return lines


def count_lines(path: Path) -> int:
    """Return the number of whole lines of a file; 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))


def found_records(path: Path, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield what records a file has that may be missing, damaged or still being written.

    `say` is told once of each kind of thing that was left out.
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
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                record = None
            if isinstance(record, dict) and type(record.get("iteration")) is int:
                found += 1
                yield record
            else:
                broken.append(place)
    if broken:
        what = (
            f"line {broken[0]} is" if len(broken) == 1 else f"{len(broken)} lines, the first {broken[0]}, are"
        )
        say(f"{path.name}: {what} no record with an iteration; left out")
    if not place:
        say(f"{path.name} is empty")
    elif not found:
        say(f"{path.name} holds no whole record")


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield every whole line, line end included, with its record."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            # the line end is written last, so a line without one is a write that a kill cut short
            if not line.endswith(b"\n"):
                logger.warning("%s:%d: incomplete last line, as a kill leaves it: not read", path, number)
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not JSON ({error}). Mend or remove the line.") from error
            if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
                raise InputError(
                    f"{path}:{number}: not a record with an integer `iteration`. Mend or remove the line."
                )
            yield line, record


def _cut(path: Path, keep_until: int | None) -> None:
    """Rewrite the file with whole records only, up to iteration `keep_until` included (None: all)."""
    kept = [line for line, record in _read(path) if keep_until is None or record["iteration"] <= keep_until]
    data = b"".join(kept)
    if len(data) != path.stat().st_size:
        write_atomically(path, data)
