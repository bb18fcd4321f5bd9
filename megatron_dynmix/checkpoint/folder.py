"""The folders of a run's checkpoints: their names, what makes one whole, and whether it still is.

`checksums.json`, the last file of a folder, names every other one: {"__0_0.distcp": [99, "blake3:..."], ...}
BLAKE3, because it is seven times as fast as SHA-256 on a processor without instructions for that one, and a
checkpoint is hashed while ranks wait.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from blake3 import blake3

from megatron_dynmix.checkpoint.run_state import RUN_STATE, Damaged, read_saved
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import sync, write_atomically

TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
BLOCK = 1 << 20

Checksum = tuple[int, str]
"""Size in bytes, and the digest in hex after `blake3:`."""


def folder_of(directory: Path, iteration: int) -> Path:
    """Return the folder of one checkpoint among a run's."""
    return directory / f"iter_{iteration:07d}"


def saved_iterations(directory: Path) -> list[int]:
    """Return the iterations that have a folder of their own among a run's checkpoints, the newest first."""
    names = (path.name.removeprefix("iter_") for path in directory.glob("iter_*") if path.is_dir())
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def set_aside(folder: Path) -> Path:
    """Take a checkpoint's name away before its files: a crash leaves no half of it that looks whole."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    return aside


def files_of(folder: Path) -> list[str]:
    """List every file of a checkpoint but `checksums.json` itself, in one order on every rank."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)


def checksum(path: Path) -> Checksum:
    """Return size and digest of a file, read block by block."""
    digest, size = blake3(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, f"blake3:{digest.hexdigest()}"


def checksums_text(sums: Mapping[str, Checksum]) -> str:
    """Return the content of `checksums.json`."""
    return json.dumps(dict(sorted(sums.items())), indent=1)


def complete(folder: Path, run_state: str, sums: Mapping[str, Checksum]) -> None:
    """Write beside the shards, whose `sums` are known, what makes a whole checkpoint of them."""
    write_atomically(folder / RUN_STATE, run_state)
    own = {}
    for name in set(files_of(folder)) - sums.keys():
        sync(folder / name)
        own[name] = checksum(folder / name)
    write_atomically(folder / CHECKSUMS, checksums_text({**sums, **own}))


def read_checksums(folder: Path) -> dict[str, Checksum]:
    """Return what the files of a checkpoint must be; raise `Damaged` if its list cannot be read."""
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


def check_whole(folder: Path) -> None:
    """Check that every file is there, with its size, and read the run state; else raise `Damaged`.

    As quick as listing the folder. A checkpoint of another version is an `InputError`.
    """
    for name, (size, _) in read_checksums(folder).items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise Damaged(f"{name}: expected {size} bytes, found no such file ({error.strerror})") from None
        if found != size:
            raise Damaged(f"{name}: expected {size} bytes, found {found}")
    read_saved(folder)


def check_contents(folder: Path, sums: Mapping[str, Checksum], names: Iterable[str]) -> None:
    """Read some files of a checkpoint; raise `Damaged` for the first that differs or cannot be read."""
    for name in names:
        try:
            found = checksum(folder / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if found != sums[name]:
            raise Damaged(f"{name}: expected {sums[name][1]}, found {found[1]}")


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has all its files, as far as their names and sizes tell."""
    try:
        check_whole(folder)
    except (Damaged, InputError):
        return False
    return True


def newest_whole(directory: Path, limit: int | None) -> int | None:
    """Return the newest whole checkpoint up to `limit`; None if there is none, or no limit is known."""
    if limit is None:
        return None
    older = (n for n in saved_iterations(directory) if n <= limit)
    return next((n for n in older if is_whole(folder_of(directory, n))), None)
