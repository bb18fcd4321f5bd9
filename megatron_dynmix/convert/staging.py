"""A folder that gets its name when it is whole, and can be gone on with until then.

.NAME.partial/.conversion.json  what is being made of what; another source or setting begins again
.NAME.partial/.finished.jsonl   one line for each file that is on the disk, with what is known of it
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.files import name_folder, sync

PLAN = ".conversion.json"
FINISHED = ".finished.jsonl"
FULL = (errno.ENOSPC, errno.EDQUOT)
GIGABYTE = 1e9


class Staging:
    """The partial folder of one conversion, held by one process at a time."""

    def __init__(self, final: Path, plan: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Make the folder, or go on with the one that is there.

        Args:
            final: the folder's name in the end.
            plan: JSON values that say what is made of what; a partial folder of another plan is begun again.
            say: prints a line.

        Raises:
            InputError: the final folder holds something, cannot be made, or another process is writing it.

        """
        self.final = final.absolute()
        try:
            if _is_taken(self.final):
                raise InputError(f"{final} is there already and is not an empty folder; give a new name")
            self.folder = partial_of(final)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._hold()
            self.finished: dict[str, Any] = self._finished(dict(plan), say)
            """File -> what is known of it."""
        except OSError as error:
            raise InputError(
                f"{final} cannot be made ({error.strerror}); give a name on a disk that has room and can be "
                "written to"
            ) from None
        self._one_line_at_a_time = threading.Lock()

    def __enter__(self) -> Staging:
        """Return the staging."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let other processes go on with the folder."""
        self._lock.close()

    def record(self, name: str, facts: Any) -> None:
        """Note that a file is whole; it is not written again when this conversion is gone on with.

        Threads may call it at the same time.
        """
        sync(self.folder / name)
        with self._one_line_at_a_time, (self.folder / FINISHED).open("a", encoding="utf-8") as file:
            self.finished[name] = facts
            file.write(self._line(name, facts))
            file.flush()
            os.fsync(file.fileno())

    def _line(self, name: str, facts: Any) -> str:
        return json.dumps([name, (self.folder / name).stat().st_size, facts]) + "\n"

    def check_space(self, needed: int) -> None:
        """See that what is still to be written finds room.

        Args:
            needed: bytes of the whole folder; what is on the disk already is taken off.

        Raises:
            InputError: too little is free; nothing has been written.

        """
        there = sum((self.folder / name).stat().st_size for name in self.finished)
        free = shutil.disk_usage(self.folder).free
        if needed - there > free:
            shortage = (
                f"{(needed - there) / GIGABYTE:.2f} GB are needed and {free / GIGABYTE:.2f} GB are free"
            )
            self._drop_if_empty()
            raise InputError(f"{self.final} does not fit: {shortage} on {self.final.parent}; make room there")

    @contextmanager
    def on_full_disk(self) -> Iterator[None]:
        """Say in one message that the disk is full.

        Raises:
            InputError: something inside met a full disk.

        """
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            free = shutil.disk_usage(self.folder).free / GIGABYTE
            raise InputError(
                f"the disk is full: {free:.2f} GB are left on {self.final.parent}. What is done lies in "
                f"{self.folder}; make room and give the same command again, and it goes on from there"
            ) from error

    def complete(self) -> None:
        """Give the folder its name.

        Raises:
            InputError: something else has taken the name since.

        """
        if _is_taken(self.final):
            raise InputError(
                f"{self.final} has been made by something else since; what is done lies in {self.folder}: "
                "take the other away and give the same command again"
            )
        for name in (PLAN, FINISHED):
            (self.folder / name).unlink()
        name_folder(self.folder, self.final)

    def _hold(self) -> IO[bytes]:
        lock = (self.folder / FINISHED).open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise InputError(
                f"another process is writing {self.folder}; wait until it is done, or give another name"
            ) from None
        return lock

    def _finished(self, plan: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        path = self.folder / PLAN
        before = _read_plan(path)
        if before != plan:
            differing = sorted(key for key in plan if before is not None and before.get(key) != plan[key])
            if differing:
                say(f"{self.folder} is unfinished with another {' and '.join(differing)}: beginning again")
            self._clear()
            path.write_text(json.dumps(plan), encoding="utf-8")
            return {}
        found = {}
        for name, size, facts in _whole_lines(self.folder / FINISHED):
            file = self.folder / name
            if file.is_file() and file.stat().st_size == size:
                found[name] = facts
        # without lines that are not true any more, or that a crash cut short: others would follow on them
        lines = "".join(self._line(name, facts) for name, facts in found.items())
        (self.folder / FINISHED).write_text(lines, encoding="utf-8")
        if found:
            say(f"going on with {self.folder}: {len(found)} files are there already")
        return found

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != FINISHED:
                path.unlink()
        os.truncate(self.folder / FINISHED, 0)

    def _drop_if_empty(self) -> None:
        if not self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)


def partial_of(final: Path) -> Path:
    """The folder in which a folder is made."""
    absolute = final.absolute()
    return absolute.with_name(f".{absolute.name}.partial")


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of a folder's files: whether it is still what a conversion was begun with."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        path.name: [stat.st_size, stat.st_mtime_ns] for path, stat in ((path, path.stat()) for path in files)
    }


def _is_taken(final: Path) -> bool:
    """Whether a folder cannot be given this name; a link never can, wherever it leads."""
    if final.is_symlink() or not final.exists():
        return final.is_symlink()
    return not final.is_dir() or any(final.iterdir())


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _whole_lines(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Lines of a journal; a crash may have cut the last one short."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            name, size, facts = json.loads(line)
        except ValueError:
            return
        yield str(name), int(size), facts
