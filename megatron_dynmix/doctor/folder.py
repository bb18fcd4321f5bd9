"""A folder that all ranks are to share: tried out, and of which kind its file system is."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What came of trying a folder."""

    path: str
    kind: str = "ext4"
    """Of file system, as /proc/mounts has it."""
    free: int = 1000 * 2**30
    error: str = ""
    """Why a file could not be written, flushed and renamed; empty if it could."""
    seconds: float = 0.0
    """That it took."""
    skew: float = 0.0
    """Seconds by which the time of the new file is ahead of this machine's clock."""


def nearest_folder(path: Path) -> Path:
    """Return the folder, or the next one above that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def try_folder(path: Path, mounts: str | None = None) -> Folder:
    """Write a file in a folder (see `nearest_folder`), flush it, rename it, remove it.

    `mounts` are lines as /proc/mounts has them, which are looked up if not given.
    """
    there = nearest_folder(path)
    draft = there / f".doctor-{os.getpid()}-{uuid.uuid4().hex}"
    final = draft.with_suffix(".done")
    begin, skew, error = time.monotonic(), 0.0, ""
    try:
        with draft.open("wb") as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
        skew = draft.stat().st_mtime - time.time()
        draft.rename(final)
        if final.read_bytes() != b"doctor":
            error = "what was written is not what is read"
    except OSError as failure:
        error = str(failure)
    finally:
        for left in (draft, final):
            left.unlink(missing_ok=True)
    return Folder(
        path=str(path),
        kind=_kind(there, _mounts() if mounts is None else mounts),
        free=shutil.disk_usage(there).free,
        error=error,
        seconds=time.monotonic() - begin,
        skew=skew,
    )


def _mounts() -> str:
    path = Path("/proc/mounts")
    return path.read_text() if path.is_file() else ""


def _kind(path: Path, mounts: str) -> str:
    """Return the file system of the deepest mount point above a path."""
    found = [line.split()[1:3] for line in mounts.splitlines()]
    above = [(len(point), kind) for point, kind in found if path.is_relative_to(point)]
    # of two that are mounted at one point, the later one is what is seen
    return max(reversed(above), key=lambda pair: pair[0])[1] if above else "unknown"
