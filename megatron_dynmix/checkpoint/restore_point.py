"""Which checkpoint a run resumes from: the newest good one that the tracker allows.

The tracker's iteration comes first, then older ones: a run that met a loss that is no number has set the
tracker back, and what is newer holds what broke it. Without a tracker that can be read, all are candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dynmix.checkpoint.folder import (
    TRACKER,
    check_contents,
    check_whole,
    folder_of,
    read_checksums,
    saved_iterations,
)
from megatron_dynmix.checkpoint.run_state import Damaged
from megatron_dynmix.errors import InputError
from megatron_dynmix.job.agreement import first_failure

REMEDY = "put it back from a copy, or start in another --run-dir"


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
