"""One process at a time in a place, on all hosts that share its file system.

FOLDER/.lock    {"token": "5f...", "host": "node7", "pid": 4711, ..., "ending": false}

Whoever creates the file holds the place, and touches it every second. A lock of the file system's own
(`flock`) would not do: not every network file system passes it on to other hosts. No clocks are compared, for
those of two hosts differ: a holder lives whose lock changes while it is watched. On the holder's own host its
process tells at once. A holder that was frozen and taken over from finds another token in its place, and must
write nothing more: it asks before it writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Literal

from megatron_dynmix.errors import CommandFailed, InputError, StoppedOnRequest

LOCK = ".lock"
BEAT_SECONDS = 1.0
POLL_SECONDS = 0.2
GLANCE_SECONDS = 3.0
"""How long to watch where an answer is wanted soon."""
STALE_SECONDS = 60.0
"""A lock of another host that has not changed for so long was left by a process that is gone."""
ENDING_SECONDS = 300.0
"""How long a run that is to be resumed waits for one that is saving its last checkpoint."""
LENGTH = 1024
"""Bytes of a lock: what is written over it is never seen by halves."""


Finding = Literal["free", "held", "gone", "unknown"]


class LeaseLost(CommandFailed):
    """The place was taken over, or the lock removed: nothing more may be written there."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a place."""

    token: str
    use: str
    """What for, as messages call it: `a run`."""
    host: str
    pid: int
    started: int | None
    """When the process started, in clock ticks after the boot: its number may have been given again."""
    pids: str
    """Boot and PID namespace, in which the number names that process."""
    since: str
    ending: bool = False

    @classmethod
    def of_this_process(cls, use: str) -> Holder:
        """Return a holder with a token of its own."""
        return cls(
            token=uuid.uuid4().hex,
            use=use,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            pids=_pids(),
            since=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )

    @classmethod
    def read(cls, content: bytes) -> Holder | None:
        """Return what a lock says; None if it is empty, cut short or of something else."""
        try:
            holder = cls(**json.loads(content))
        except (ValueError, TypeError):
            return None
        return holder if isinstance(holder.pid, int) and holder.pid > 0 else None

    def text(self) -> bytes:
        """Return the content of the lock."""
        return json.dumps(asdict(self)).encode().ljust(LENGTH - 1) + b"\n"

    def lives(self) -> bool | None:
        """Tell whether its process runs; None if that cannot be told from here."""
        if not self.pids or (self.host, self.pids) != (socket.gethostname(), _pids()):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's, of whom /proc may not tell more
            pass
        started = _started(self.pid)
        return None if started is None else started == self.started

    def __str__(self) -> str:
        return f"{self.use} (pid {self.pid} on host {self.host}, since {self.since})"


@dataclass(frozen=True)
class _Seen:
    """A lock as it was found."""

    content: bytes
    changed_ns: int

    @classmethod
    def at(cls, path: Path) -> _Seen | None:
        try:
            with path.open("rb") as file:  # opening asks a network file system anew
                return cls(file.read(LENGTH), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None
        except PermissionError:
            return cls(b"", path.stat().st_mtime_ns)

    @property
    def holder(self) -> Holder | None:
        return Holder.read(self.content)

    def describe(self) -> str:
        return str(self.holder or "something that cannot be told from it")


class _Watch:
    """What becomes of a lock while it is looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: _Seen | None = None
        self.why = ""
        """How it was found out that the holder is gone."""
        self._changed_at, self._changes = 0.0, 0

    def look(self) -> Finding:
        """Tell what is known by now of the place and its holder."""
        before, self.seen = self.seen, _Seen.at(self.path)
        now = time.monotonic()
        if self.seen is None:
            return "free"
        holder = self.seen.holder
        if before is None or (before.holder and before.holder.token) != (holder and holder.token):
            self._changed_at, self._changes = now, 0
        elif before != self.seen:
            self._changed_at, self._changes = now, self._changes + 1
        lives = None if holder is None else holder.lives()
        if lives is False:
            self.why = "its process has ended"
            return "gone"
        if lives is None and now - self._changed_at > STALE_SECONDS:
            self.why = f"its lock has not changed for {STALE_SECONDS:g} s"
            return "gone"
        return "held" if lives or self._changes else "unknown"


def no_patience(holder: Holder | None) -> float:
    """Wait for nobody."""
    return 0.0


def for_one_that_ends(holder: Holder | None) -> float:
    """Wait for a run that has been asked to stop, and is saving."""
    return ENDING_SECONDS if holder is not None and holder.ending else 0.0


def as_long_as_it_takes(holder: Holder | None) -> float:
    """Wait for whoever it is."""
    return math.inf


class Lease:
    """Exclusive use of a place, for as long as the `with` lasts."""

    def __init__(self, path: Path, use: str, remedy: str) -> None:
        """Name the lock, what the place is to be used for, and what helps where it is taken."""
        self.path = path
        self._mine = Holder.of_this_process(use)
        self._remedy = remedy
        self._file: int | None = None
        self._lost: str | None = None
        self._ending = self._over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.when_lost: Callable[[], None] = lambda: None
        """Called by whoever finds out first: the thread that beats, or who asks before writing."""

    def refuse_if_held(self) -> None:
        """Raise `InputError` if somebody uses the place and is not about to end, as far as is seen soon."""
        watch, deadline, found = _Watch(self.path), time.monotonic() + GLANCE_SECONDS, "free"
        with contextlib.suppress(OSError):  # who takes it will hear of that
            while (found := watch.look()) == "unknown" and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        if found == "held" and watch.seen is not None and not for_one_that_ends(watch.seen.holder):
            raise self._refusal(watch.seen)

    def take(
        self,
        *,
        patience: Callable[[Holder | None], float] = no_patience,
        idle: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> Lease:
        """Take the place, from a holder that is gone if need be; wait so many seconds for one that is not.

        While it waits or watches it calls `idle` again and again. `InputError` names the holder;
        `StoppedOnRequest` if one was waited for in vain, `OSError` if the lock cannot be made or read.
        """
        watch, begun, said = _Watch(self.path), time.monotonic(), ""
        while not self._create():
            found = watch.look()
            if watch.seen is None:
                continue
            if found == "gone":
                if self._take_away(watch.seen):
                    say(f"{self.path} was left by {watch.seen.describe()}: {watch.why}; it is taken over")
                continue
            if found == "unknown":
                text = f"to see within {STALE_SECONDS:g} s whether its holder is there"
            elif not (seconds := patience(watch.seen.holder)):
                raise self._refusal(watch.seen)
            elif time.monotonic() - begun > seconds:
                raise StoppedOnRequest(
                    f"{watch.seen.describe()} still holds {self.path} after {seconds:g} s; run the same "
                    "command again"
                )
            else:
                limit = "" if seconds == math.inf else f", at most {seconds:g} s"
                text = f"until its holder is done{limit}"
            if text != said:
                say(f"{self.path}, held by {watch.seen.describe()}: waiting {text}")
                said = text
            idle()
            time.sleep(POLL_SECONDS)
        self._thread.start()
        return self

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the place to others."""
        self._over = True
        self._wake.set()
        self._thread.join(BEAT_SECONDS)  # longer, if its disk does not answer: it ends by itself
        if self.lost() is None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        if self._file is not None:
            os.close(self._file)

    def say_ending(self) -> None:
        """Let those that want the place know that it is worth waiting for."""
        self._ending = True
        self._wake.set()

    def lost(self) -> str | None:
        """Return how the place was lost, for good; None while it is ours."""
        for _ in range(2):
            if self._lost is not None:
                return self._lost
            try:
                seen = _Seen.at(self.path)
            except OSError:  # a disk that does not answer tells nothing; to write there will fail too
                return None
            holder = None if seen is None else seen.holder
            if holder is not None:
                if holder.token == self._mine.token:
                    return None
                break
            time.sleep(BEAT_SECONDS)  # another may have moved it to see whose it is
        how = f"has been taken over by {holder}" if holder else "is gone or holds something else"
        self._lost = (
            f"{self.path}, the lock of {self._mine}, {how}: nothing more is written to {self.path.parent}. "
            "Let no other process use it, and start again"
        )
        self.when_lost()
        return self._lost

    def check(self) -> None:
        """Raise `LeaseLost` unless the place is ours: to be asked before another holder could suffer."""
        if text := self.lost():
            raise LeaseLost(text)

    def _beat(self) -> None:
        assert self._file is not None, "it is taken"
        told = False
        while not self._over and self.lost() is None:
            with contextlib.suppress(OSError):  # the next beat may find the disk in better health
                os.utime(self._file)
                if self._ending and not told:
                    os.pwrite(self._file, Holder(**{**asdict(self._mine), "ending": True}).text(), 0)
                    told = True
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _create(self) -> bool:
        """Create the lock; whether it was not there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            os.pwrite(self._file, self._mine.text(), 0)
            os.fsync(self._file)
        except OSError:  # no room
            os.close(self._file)
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _take_away(self, seen: _Seen) -> bool:
        """Remove a lock whose holder is gone, unless it is another by now."""
        aside = self.path.with_name(f"{self.path.name}.{self._mine.token}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return False
        is_the_same = _Seen.at(aside) == seen
        if not is_the_same:  # it was taken over by another in between
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        aside.unlink()
        return is_the_same

    def _refusal(self, seen: _Seen) -> InputError:
        return InputError(
            f"{self.path.parent} is in use by {seen.describe()}, as {self.path} says; wait until that is "
            f"done, or stop it, or {self._remedy}"
        )


def _pids() -> str:
    """Return boot and PID namespace of this host; nothing where there is no /proc to ask."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return when a process started; -1 of one that has ended, None if it cannot be told."""
    try:
        # its name, in parentheses, may hold anything
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(fields[18])
