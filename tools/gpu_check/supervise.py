"""Run parts one after another in a process of their own, each with its own limit of time.

A part is a function `(job, figures)`: it puts plain numbers and texts into `figures` and raises if it found
something wrong. Nothing here imports torch, so that a broken installation is a part that failed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
STARTING = 30
"""Seconds in which a process has to start; it has imported nothing yet."""
IMPORTING = 60
"""Seconds that the first part of a process has beside its own, for what is imported and compiled."""
MOST_SAID = 500
"""Characters of an error that a line holds; the log has all of it."""

Figures = dict[str, Any]
Line = dict[str, Any]
"""`part`, `ok`, `seconds`, the part's figures, and `error` if it is not ok."""


@dataclass(frozen=True)
class Part:
    """A function, by its name, and the seconds that it may take."""

    function: str
    """`module:name`; the name is the part's."""
    seconds: float

    @property
    def name(self) -> str:
        """Return how its line is called."""
        return self.function.partition(":")[2]


@dataclass(frozen=True)
class Job:
    """What every part is told."""

    data: Path
    """Folder of the quickstart's sources; made, if it is not there."""
    scratch: Path
    """Folder for what a part writes; removed at the end."""
    carried: Path
    """Folder of what was prepared on another machine; it may be missing."""
    tiny: bool
    """Whether the parts run at a size for a CPU."""


def lines_of(parts: Sequence[Part], job: Job, log: Path, ends: float) -> Iterator[Line]:
    """Yield the line of each part; after a part that fails, the next has a new process.

    `ends` is when all time is used up, on the monotonic clock: parts that have not begun by then fail.
    """
    worker = None
    for part in parts:
        left = ends - time.monotonic()
        if left <= 0:
            yield {"part": part.name, "ok": False, "seconds": 0.0, "error": "not begun: no time was left"}
            continue
        fresh = worker is None
        worker = worker or Worker(log)
        line = worker.run(part, job, min(part.seconds + fresh * IMPORTING, left))
        if not line["ok"]:
            worker.end()
            worker = None
        yield line
    if worker is not None:
        worker.end()


class Worker:
    """A process that runs parts; what it prints goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_work, args=(theirs, str(log)))
        self._process.start()
        theirs.close()
        with contextlib.suppress(EOFError):  # a process that has died is told of by its first part
            if self._pipe.poll(STARTING):
                self._pipe.recv()

    def run(self, part: Part, job: Job, limit: float) -> Line:
        """Run a part and return its line, after `limit` seconds at the latest."""
        start = time.monotonic()
        figures: Figures = {}
        try:
            self._pipe.send((part.function, job))
            if self._pipe.poll(limit):
                figures, error = self._pipe.recv()
            else:
                error = f"ran out of its {limit:.0f} s; the log says where it was"
                os.kill(self._process.pid, signal.SIGUSR2)
                time.sleep(0.5)
        except (EOFError, OSError):
            self._process.join(5)
            error = f"its process died with exit code {self._process.exitcode}"
        line = {
            "part": part.name,
            "ok": error is None,
            "seconds": round(time.monotonic() - start, 2),
            **figures,
        }
        return line if error is None else {**line, "error": error}

    def end(self) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _work(pipe: Connection, log: str) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR2)
    pipe.send("here")
    while True:
        function, job = pipe.recv()
        figures: Figures = {}
        error = None
        print(f"==== {function}", flush=True)
        try:
            module, _, name = function.partition(":")
            getattr(importlib.import_module(module), name)(job, figures)
            json.dumps(figures, allow_nan=False)
        except BaseException as raised:
            traceback.print_exc()
            said = str(raised)[:MOST_SAID]
            error = f"{type(raised).__name__}: {said} ({_where(raised)})"
            figures = {name: value for name, value in figures.items() if _is_json(value)}
        sys.stdout.flush()
        pipe.send((figures, error))


def _where(raised: BaseException) -> str:
    """Return the last line of the traceback that is no package's."""
    frames = traceback.extract_tb(raised.__traceback__)
    here = [frame for frame in frames if frame.filename.startswith(os.getcwd())]
    last = (here or frames)[-1]
    return f"{os.path.relpath(last.filename)}:{last.lineno}"


def _is_json(value: Any) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        return bool(json.dumps(value, allow_nan=False))
    return False
