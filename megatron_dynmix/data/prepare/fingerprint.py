"""What an input file held when it was read, so that an unchanged one is not prepared again."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dynmix.errors import InputError

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input as it was read: its path, size in bytes, time of last change (ns) and SHA-256."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def read_input(path: Path) -> InputFile:
    """Read a file (or the files of a folder that is one input) through for its digest.

    Raises:
        InputError: it cannot be read.

    """
    size, mtime_ns = _size_and_time(path)
    digest = hashlib.sha256()
    try:
        for part in _files(path):
            with part.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
    except OSError as error:
        raise _unreadable(path, error) from error
    return InputFile(path=str(path), size=size, mtime_ns=mtime_ns, sha256=digest.hexdigest())


def recheck(inputs: Sequence[Path], recorded: Sequence[InputFile]) -> tuple[InputFile, ...] | None:
    """Return the files as they are now if they hold the bytes that were recorded, else None.

    A file of the same path, size and time of last change is taken to be the same: what takes an hour
    to prepare may take a minute to read. Where only the path or time differs its bytes decide.

    Raises:
        InputError: a file cannot be read.

    """
    stats = [_size_and_time(path) for path in inputs]
    if [size for size, _ in stats] != [before.size for before in recorded]:
        return None
    files = []
    for path, (_, mtime_ns), before in zip(inputs, stats, recorded, strict=True):
        same = (str(path), mtime_ns) == (before.path, before.mtime_ns)
        files.append(before if same else read_input(path))
        if files[-1].sha256 != before.sha256:
            return None
    return tuple(files)


def refuse_changed(inputs: Sequence[InputFile]) -> None:
    """Refuse files that are not what they were when their digests were taken.

    Raises:
        InputError: a file was changed meanwhile.

    """
    for before in inputs:
        if _size_and_time(Path(before.path)) != (before.size, before.mtime_ns):
            raise InputError(f"{before.path}: was changed while it was read; prepare it when it is complete")


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stats = [part.stat() for part in _files(path)]
    except OSError as error:
        raise _unreadable(path, error) from error
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def _files(path: Path) -> list[Path]:
    """The file itself, or those of a folder that is one input."""
    if not path.is_dir():
        return [path]
    return sorted(part for part in path.rglob("*") if part.is_file())


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}); give an existing file")
