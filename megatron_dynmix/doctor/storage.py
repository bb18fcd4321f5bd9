"""Checks of a folder that all ranks are to share: tried out, and of which kind its file system is."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_dynmix.doctor.checks import Finding, good, problem, warning

GIB = 2**30
SKEW_SECONDS = 2.0
"""Between this machine's clock and that of the file server."""
SLOW_SECONDS = 5.0
"""To write, flush and rename one small file."""
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "ramfs", "vfat", "apfs")
NOTES = {
    "nfs": "other nodes may see new files some seconds late; saves wait for that",
    "nfs4": "other nodes may see new files some seconds late; saves wait for that",
    "lustre": "stripe the checkpoint folder wide (lfs setstripe -c -1)",
}


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What came of trying a folder."""

    path: str
    kind: str = "ext4"
    """Of file system, as /proc/mounts has it."""
    free: int = 1000 * GIB
    error: str = ""
    """Why a file could not be written, flushed and renamed; empty if it could."""
    seconds: float = 0.0
    """That it took."""
    skew: float = 0.0
    """Seconds by which the time of the new file is ahead of this machine's clock."""


def nearest_folder(path: Path) -> Path:
    """The folder, or the next one above that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def try_folder(path: Path, mounts: str | None = None) -> Folder:
    """Write a file in a folder (see `nearest_folder`), flush it, rename it, remove it.

    Args:
        path: the folder.
        mounts: lines as /proc/mounts has them; looked up if not given.

    """
    there = nearest_folder(path)
    kind = _kind(there, _mounts() if mounts is None else mounts)
    draft = there / f".doctor-{os.getpid()}-{uuid.uuid4().hex}"
    final = draft.with_suffix(".done")
    begin = time.monotonic()
    try:
        with draft.open("wb") as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
        skew = draft.stat().st_mtime - time.time()
        draft.rename(final)
        error = "" if final.read_bytes() == b"doctor" else "what was written is not what is read"
    except OSError as failure:
        skew, error = 0.0, str(failure)
    finally:
        for left in (draft, final):
            left.unlink(missing_ok=True)
    seconds = time.monotonic() - begin
    free = shutil.disk_usage(there).free
    return Folder(path=str(path), kind=kind, free=free, error=error, seconds=seconds, skew=skew)


def _mounts() -> str:
    path = Path("/proc/mounts")
    return path.read_text() if path.is_file() else ""


def _kind(path: Path, mounts: str) -> str:
    """The file system of the deepest mount point above a path."""
    best = ("", "unknown")
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def check_folder(folder: Folder, environment: Mapping[str, str], checkpoint: int | None) -> list[Finding]:
    """Every check of a folder.

    Args:
        folder: what came of trying it.
        environment: which says whether the job has several nodes.
        checkpoint: bytes of one checkpoint of the run, if it is known.

    """
    return [writing(folder), sharing(folder, environment), space(folder, checkpoint), clock(folder)]


def writing(folder: Folder) -> Finding:
    """Whether a small file can be written, flushed and renamed, and how fast."""
    if folder.error:
        remedy = "another folder, or its permissions and quota (quota -s, lfs quota)"
        return problem("writing", f"{folder.path}: {folder.error}", remedy)
    found = f"{folder.path}: a file is written, flushed and renamed in {folder.seconds * 1000:.0f} ms"
    if folder.seconds > SLOW_SECONDS:
        return warning("writing", found, "the file server is overloaded or far away; try another one")
    return good("writing", found)


def sharing(folder: Folder, environment: Mapping[str, str]) -> Finding:
    """Whether other nodes see the folder, as far as the kind of its file system tells."""
    name, nodes = "file system", _nodes(environment)
    if folder.kind in LOCAL:
        if nodes > 1:
            return problem(
                name,
                f"{folder.path} is on {folder.kind}, which this node alone sees; the job has {nodes} nodes",
                "put sources, prepared_dir and --run-dir on a file system that all nodes share",
            )
        return good(name, f"{folder.kind}, of this node only")
    return good(name, f"{folder.kind}{f': {NOTES[folder.kind]}' if folder.kind in NOTES else ''}")


def _nodes(environment: Mapping[str, str]) -> int:
    """Nodes of the job that this process is in; 1 outside of one."""
    for total, local in (("SLURM_JOB_NUM_NODES", None), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")):
        if environment.get(total, "").isdigit():
            each = environment.get(local, "") if local else "1"
            if each.isdigit() and int(each):
                return -(-int(environment[total]) // int(each))
    return 1


def space(folder: Folder, checkpoint: int | None) -> Finding:
    """Whether two checkpoints fit: the newest is removed only when the next is whole."""
    found = f"{folder.free / GIB:.0f} GiB are free"
    if checkpoint is None:
        return good("space", found)
    needed = f"a checkpoint of this run is {checkpoint / GIB:.1f} GiB"
    if folder.free < 2 * checkpoint:
        remedy = "make room for two, or give a smaller checkpoint.keep_last"
        return problem("space", f"{found}, {needed}", remedy)
    return good("space", f"{found}, {needed}")


def clock(folder: Folder) -> Finding:
    """Whether this machine and the file server agree on the time."""
    if abs(folder.skew) > SKEW_SECONDS:
        found = f"new files are {folder.skew:+.1f} s off this machine's clock"
        return warning(
            "clock", found, "synchronise the clocks (chrony, ntpd): times in logs will not compare"
        )
    return good("clock", "agrees with the file system's")
