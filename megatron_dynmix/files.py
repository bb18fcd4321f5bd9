"""What every part does with files: JSON with mistakes named, and writes that a crash cannot halve."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_dynmix.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk, or somebody's share of it, has no room left."""


class Number(float):
    """A JSON number with a fraction or an exponent that keeps its digits: `1.10`, `1e5`.

    `json.dumps` writes floats by their value: it is `text` that stands in the row.
    """

    def __new__(cls, text: str) -> Number:
        """Return the number that is written so."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __repr__(self) -> str:
        return self.text


def parse_json(raw: bytes, parse_float: Callable[[str], float] = float) -> Any:
    """Return the value of one JSON text; `ValueError` with a short reason if it is not strict JSON."""
    try:
        return json.loads(
            raw.decode("utf-8"),
            parse_float=parse_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not strict JSON: {error}") from None


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


def read_json(path: Path) -> Any:
    """Return the value of a file that a user has written: strict JSON, or `InputError`."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file that a program has written, or raise `InputError` with the remedy."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {value!r:.40} and no settings by name; {remedy}")
    return value


def sha256(content: object) -> str:
    """Return the SHA-256, in hex, of bytes, of a text, or of anything else as JSON."""
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the name once it is whole; a crash leaves what was there."""
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}")  # ranks of several hosts may race
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def inodes_are_used_up(path: Path) -> bool:
    """Whether the disk of a path, which need not be there, takes no more files though it may have room."""
    try:
        stats = os.statvfs(next(folder for folder in (path, *path.absolute().parents) if folder.exists()))
    except OSError:
        return False
    return bool(stats.f_files) and not stats.f_favail


def why_not_written(error: OSError, path: Path) -> str:
    """Return why the system did not write a file; it calls a disk without inodes full."""
    if error.errno == errno.ENOSPC and inodes_are_used_up(path):
        return f"{error.strerror}: no inode is left, see df -i; remove files, however small"
    return error.strerror or str(error)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def name_folder(draft: Path, final: Path) -> None:
    """Give a folder whose files are on the disk its name; an empty folder of that name makes way."""
    sync(draft)
    draft.rename(final)
    sync(final.parent)
