"""The folders of a run's checkpoints: what makes one whole, whether it still is, which one to resume from.

That is the newest good one up to the tracker's iteration: a run that met a loss that is no number has set the
tracker back, and what is newer holds what broke it. Without a tracker that can be read, all are candidates.

`checksums.json`, the last file of a folder, names every other one: {"__0_0.distcp": [99, "blake3:..."], ...}
BLAKE3, because it is seven times as fast as SHA-256 on a processor without instructions for that one, and a
checkpoint is hashed while ranks wait.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3

from megatron_dynmix.checkpoint.run_state import RUN_STATE, Damaged, read_saved
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import sync, write_atomically
from megatron_dynmix.job.agreement import first_failure

TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
BLOCK = 1 << 20
REMEDY = "put it back from a copy, or start in another --run-dir"

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


@dataclass(frozen=True)
class RestorePoint:
    """A checkpoint folder, and what was found wrong on the way to it."""

    source: Path
    notes: tuple[str, ...] = ()
    """Lines for the log."""


def has_checkpoint(directory: Path) -> bool:
    """Whether a checkpoints folder holds anything that calls itself a checkpoint."""
    return (directory / TRACKER).is_file() or bool(saved_iterations(directory))


def newest_good(directory: Path, damaged: Mapping[Path, str] | None = None) -> RestorePoint:
    """Return the checkpoint to resume from among a run's, as far as names and sizes of its files tell.

    `damaged` are folders whose content is known to be bad, and why. It is an `InputError` if none is left,
    or if it is of another version.
    """
    tracker = directory / TRACKER
    tracked, notes = _tracked(tracker)
    folders = saved_iterations(directory)
    candidates = [number for number in folders if tracked is None or number <= tracked]
    if not folders and not tracker.is_file():
        raise InputError(f"{directory} holds no checkpoint: there is no iter_* folder and no {TRACKER} in it")
    if not candidates:
        newer = f"; to resume from iter_{folders[0]:07d}, write {folders[0]} into it" if folders else ""
        raise InputError(f"{tracker} names iteration {tracked}, but there is no such checkpoint{newer}")
    if tracked not in (None, candidates[0]):
        notes.append(
            f"{tracker} names iteration {tracked}, but there is no folder {folder_of(directory, tracked)}"
        )
    for number in candidates:
        source = folder_of(directory, number)
        try:
            if damaged and source in damaged:
                raise Damaged(damaged[source])
            check_whole(source)
        except Damaged as damage:
            notes.append(f"{source} is damaged: {damage}")
            continue
        if notes:
            notes[-1] += f"; {source} is used instead"
        return RestorePoint(source, tuple(notes))
    raise InputError(f"{'; '.join(notes)}; no good checkpoint is left: {REMEDY}")


def exact(point: RestorePoint) -> Path:
    """Return the checkpoint that the tracker names, or refuse: weights of no other one will do."""
    if point.notes:
        raise InputError(
            f"{'; '.join(point.notes)}. But weights of another checkpoint are not taken unasked: write the "
            f"iteration that is wanted into {point.source.parent / TRACKER}"
        )
    return point.source


def verified(directory: Path) -> RestorePoint:
    """Return a `newest_good` whose content was read and compared, each file by one rank; the same on all."""
    damaged: dict[Path, str] = {}
    while True:
        point = _rank0s_choice(directory, damaged)
        failure = None
        try:
            sums = read_checksums(point.source)
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            check_contents(point.source, sums, sorted(sums)[rank::world_size])
        except Damaged as damage:
            failure = str(damage)
        failure = first_failure(failure)
        if failure is None:
            return point
        damaged[point.source] = failure


def _rank0s_choice(directory: Path, damaged: Mapping[Path, str]) -> RestorePoint:
    """Return rank 0's `newest_good` on every rank: what ranks see of a shared disk may differ a moment."""
    choice: list[RestorePoint | InputError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            choice[0] = newest_good(directory, damaged)
        except InputError as error:
            choice[0] = error
    torch.distributed.broadcast_object_list(choice, src=0)
    if isinstance(choice[0], InputError):
        raise choice[0]
    assert choice[0] is not None, "rank 0 chooses or refuses"
    return choice[0]


def _tracked(tracker: Path) -> tuple[int | None, list[str]]:
    """Return the iteration that the tracker names; or none, and a line that says why."""
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except OSError as error:
        return None, [f"{tracker} cannot be read ({error.strerror})"]
    except ValueError:
        text = "(not text)"
    if not text.isascii() or not text.isdigit():
        return None, [f"{tracker} names no iteration (it holds {text!r})"]
    return int(text), []
