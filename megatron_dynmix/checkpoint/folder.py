"""Checksums of a checkpoint folder: `checksums.json`, the last of its files, names every other one.

{"__0_0.distcp": [size in bytes, "blake3:..."], ...}

BLAKE3, because it is seven times as fast as SHA-256 on a processor without instructions for that one, and a
checkpoint is hashed while ranks wait.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from megatron_dynmix.checkpoint.run_state import Damaged, read_run_state
from megatron_dynmix.errors import InputError

TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
BLOCK = 1 << 20

Checksum = tuple[int, str]
"""Size in bytes, and `blake3:` before the digest in hex."""


def files_of(folder: Path) -> list[str]:
    """Every file of a checkpoint folder but `checksums.json` itself, in one order on every rank."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)


def checksum(path: Path) -> Checksum:
    """Return size and digest of a file, read block by block."""
    digest = blake3()
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, f"blake3:{digest.hexdigest()}"


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
        listed = json.loads(path.read_text()).items()
        sums = {str(name): (int(size), str(digest)) for name, (size, digest) in listed}
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
            raise Damaged(f"{name}: expected {sums[name][1]}, found {found[1]}")


def set_aside(folder: Path) -> Path:
    """Take a checkpoint's name away before its files: a crash leaves no half of it that looks whole."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    return aside


def folder_of(directory: Path, iteration: int) -> Path:
    """The folder of one checkpoint among a run's."""
    return directory / f"iter_{iteration:07d}"


def saved_iterations(directory: Path) -> list[int]:
    """Iterations that have a folder of their own among a run's checkpoints, the newest first."""
    names = (path.name.removeprefix("iter_") for path in directory.glob("iter_*") if path.is_dir())
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint folder has all its files, as far as their names and sizes tell."""
    try:
        check_sizes(folder, read_checksums(folder))
        read_run_state(folder)
    except (Damaged, InputError):
        return False
    return True


def newest_whole(directory: Path, limit: int | None) -> int | None:
    """Iteration of the newest whole checkpoint up to `limit`; None if there is none, or no limit is known."""
    if limit is None:
        return None
    older = (n for n in saved_iterations(directory) if n <= limit)
    return next((n for n in older if is_whole(folder_of(directory, n))), None)
