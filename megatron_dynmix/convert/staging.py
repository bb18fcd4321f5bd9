"""A folder that gets its name when it is whole; until then, a conversion that was stopped can resume in it.

.NAME.partial/.conversion.json  what is being made of what; another source or setting starts over
.NAME.partial/.finished.jsonl   one line for each file that is on the disk, with what is known of it
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.files import FULL, inodes_are_used_up, name_folder, sync
from megatron_dynmix.lease import LOCK, Lease

PLAN = ".conversion.json"
FINISHED = ".finished.jsonl"
GIGABYTE = 1e9


class Staging:
    """The partial folder of one conversion, held by one process at a time."""

    def __init__(self, final: Path, plan: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Make the folder, or resume in the one that is there.

        The plan is JSON values that say what is made of what; a partial folder of another plan is emptied.
        """
        self.final = final.absolute()
        try:
            if _is_taken(self.final):
                raise InputError(f"{final} is there already and is not an empty folder; give a new name")
            self.folder = partial_of(final)
            lock = self.folder.with_suffix(LOCK)
            self._lease = Lease(lock, f"a conversion to {final}", "give another name")
            with contextlib.ExitStack() as held:
                held.enter_context(self._lease.take(say=say))
                self.folder.mkdir(exist_ok=True)
                self.finished: dict[str, Any] = self._finished(dict(plan), say)
                """File -> what is known of it."""
                self._held = held.pop_all()
        except OSError as error:
            raise InputError(
                f"{final} cannot be made ({error.strerror}); give a name on a disk that has room and can be "
                "written to"
            ) from None
        self._one_line_at_a_time = threading.Lock()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let other processes resume in the folder; say in one message that the disk is full, if it is."""
        self._held.close()
        if isinstance(value, OSError) and value.errno in FULL:
            free = shutil.disk_usage(self.folder).free / GIGABYTE
            left = "no inode is" if inodes_are_used_up(self.folder) else f"{free:.2f} GB are"
            raise InputError(
                f"the disk is full: {left} left on {self.final.parent}. What is done lies in "
                f"{self.folder}; make room and give the same command again, and it resumes from there"
            ) from value

    def record(self, name: str, facts: Any = None) -> None:
        """Note that a file is whole: it is not written again. Threads may call it at the same time."""
        sync(self.folder / name)
        with self._one_line_at_a_time, (self.folder / FINISHED).open("a", encoding="utf-8") as file:
            self.finished[name] = facts
            file.write(self._line(name, facts))
            file.flush()
            os.fsync(file.fileno())

    def _line(self, name: str, facts: Any) -> str:
        return json.dumps([name, (self.folder / name).stat().st_size, facts]) + "\n"

    def check_space(self, needed: int) -> None:
        """Refuse to begin if what is still to be written of so many bytes finds no room."""
        missing = needed - sum((self.folder / name).stat().st_size for name in self.finished)
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            if not self.finished:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise InputError(
                f"{self.final} does not fit: {missing / GIGABYTE:.2f} GB are needed and "
                f"{free / GIGABYTE:.2f} GB are free on {self.final.parent}; make room there"
            )

    def complete(self) -> None:
        """Give the folder its name."""
        self._lease.check()
        if _is_taken(self.final):
            raise InputError(
                f"{self.final} has been made by something else since; what is done lies in {self.folder}: "
                "take the other away and give the same command again"
            )
        for name in (PLAN, FINISHED):
            (self.folder / name).unlink()
        name_folder(self.folder, self.final)  # in place of an empty folder, if there is one

    def _finished(self, plan: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Return what is done of this plan; without it, empty the folder and write the plan down."""
        before: dict[str, Any] | None = None
        with contextlib.suppress(OSError, ValueError, TypeError):  # none, or one that a crash cut short
            before = dict(json.loads((self.folder / PLAN).read_text(encoding="utf-8")))
        if before != plan:
            if differing := sorted(key for key in plan if before and before.get(key) != plan[key]):
                say(f"{self.folder} is unfinished with another {' and '.join(differing)}: starting over")
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            (self.folder / FINISHED).touch()
            (self.folder / PLAN).write_text(json.dumps(plan), encoding="utf-8")
            return {}
        found = {
            name: facts
            for name, size, facts in _whole_lines(self.folder / FINISHED)
            if (self.folder / name).is_file() and (self.folder / name).stat().st_size == size
        }
        # without lines that are not true any more, or that a crash cut short: others would follow on them
        lines = "".join(self._line(name, facts) for name, facts in found.items())
        (self.folder / FINISHED).write_text(lines, encoding="utf-8")
        if found:
            say(f"resuming in {self.folder}: {len(found)} files are there already")
        return found


def partial_of(final: Path) -> Path:
    """Return the folder in which a folder is made."""
    absolute = final.absolute()
    return absolute.with_name(f".{absolute.name}.partial")


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Return sizes and times of a folder's files: whether it is still what a conversion was begun with."""
    stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats}


def _is_taken(final: Path) -> bool:
    """Whether a folder cannot be given this name; a link never can, wherever it leads."""
    return final.is_symlink() or (final.exists() and (not final.is_dir() or any(final.iterdir())))


def _whole_lines(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Yield the lines of a journal; a crash may have cut the last one short."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            name, size, facts = json.loads(line)
        except ValueError:
            return
        yield str(name), int(size), facts
