"""Checksums of a checkpoint folder: `checksums.json`, the last of its files, names every other one.

{"__0_0.distcp": [size in bytes, sha256], ...}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

CHECKSUMS = "checksums.json"
BLOCK = 1 << 20

Checksum = tuple[int, str]
"""Size in bytes and SHA-256 in hex."""


class Damaged(Exception):
    """A file of a checkpoint is not what was written; the message names it, what is expected and found."""


def files_of(folder: Path) -> list[str]:
    """Every file of a checkpoint folder but `checksums.json` itself, in one order on every rank."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)


def checksum(path: Path) -> Checksum:
    """Size and SHA-256 of a file, read block by block."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def checksums_text(sums: dict[str, Checksum]) -> str:
    """The content of `checksums.json`."""
    return json.dumps(dict(sorted(sums.items())), indent=1)


def read_checksums(folder: Path) -> dict[str, Checksum]:
    """What the files of a checkpoint folder must be.

    Raises:
        Damaged: the folder was not written to its end, or the list cannot be read.

    """
    path = folder / CHECKSUMS
    if not path.is_file():
        raise Damaged(f"it was not written to its end: there is no {CHECKSUMS} in it")
    try:
        sums = {
            str(name): (int(size), str(digest))
            for name, (size, digest) in json.loads(path.read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Damaged(f"{CHECKSUMS} cannot be read ({error})") from None
    if not sums:
        raise Damaged(f"{CHECKSUMS} names no file")
    return sums


def check_sizes(folder: Path, sums: dict[str, Checksum]) -> None:
    """See that every file is there, with its size: as quick as listing the folder.

    Raises:
        Damaged: the first file that is not.

    """
    for name, (size, _) in sums.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise Damaged(f"{name}: expected {size} bytes, found no such file ({error.strerror})") from None
        if found != size:
            raise Damaged(f"{name}: expected {size} bytes, found {found}")


def check_contents(folder: Path, sums: dict[str, Checksum], names: Iterable[str]) -> None:
    """Read files and compare them with their checksums.

    Args:
        folder: a checkpoint folder.
        sums: its checksums.
        names: the files to compare: a rank's share of them.

    Raises:
        Damaged: the first file that differs or cannot be read.

    """
    for name in names:
        try:
            found = checksum(folder / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if found != sums[name]:
            raise Damaged(f"{name}: expected sha256 {sums[name][1]}, found {found[1]}")
