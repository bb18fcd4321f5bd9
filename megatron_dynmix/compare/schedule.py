"""The cells as processes, several at a time: nothing of one is lost when another fails."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dynmix.compare.cell import Cell
from megatron_dynmix.errors import StoppedOnRequest
from megatron_dynmix.job.launch import Lifeline, end_session
from megatron_dynmix.job.signals import handling

POLL_SECONDS = 0.2
STOP_SECONDS = 120.0
"""How long cells that are asked to stop have to save what they have."""


@dataclass(frozen=True)
class Task:
    """What is left to do of one cell."""

    cell: Cell
    commands: tuple[list[str], ...]
    """One after the other; none for a finished cell."""


class _Running:
    """A task under way."""

    process: subprocess.Popen[bytes]

    def __init__(self, task: Task, lifeline: Lifeline) -> None:
        self._cell, self._commands, self._lifeline = task.cell, iter(task.commands), lifeline
        self._started = time.monotonic()
        self._log_start = 0
        task.cell.run_dir.mkdir(parents=True, exist_ok=True)
        self.start_next()

    def start_next(self) -> bool:
        """Start the next command; return whether there was one."""
        command = next(self._commands, None)
        if command is None:
            return False
        with self._cell.log.open("ab") as log:
            self._log_start = log.tell()
            self.process = self._lifeline.start(command, {}, log)
        return True

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    def reason(self, code: int) -> str:
        """Return the last words of its process: a message, or the end of what it said."""
        said = self._cell.log.read_bytes()[self._log_start :].decode("utf-8", errors="replace")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        messages = [line for line in lines if line.startswith("megatron-dynmix")]
        last = (messages or lines or ["it said nothing"])[-1]
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{last.removeprefix('megatron-dynmix: ')} ({end}; {self._cell.log})"


def run_tasks(tasks: Sequence[Task], jobs: int, say: Callable[[str], None]) -> dict[int, str]:
    """Carry out the tasks in their order, `jobs` at a time; each is one process and its ranks.

    Returns:
        Why a task failed, by its place in `tasks`.

    Raises:
        StoppedOnRequest: a signal asked for it; the cells have saved what they had.
        KeyboardInterrupt: likewise, at a terminal.

    """
    failures: dict[int, str] = {}
    waiting = [place for place, task in enumerate(tasks) if task.commands]
    running: dict[int, _Running] = {}
    lifeline = Lifeline()

    def tell(place: int, what: str) -> None:
        done = len(tasks) - len(waiting) - len(running)
        say(f"[{done}/{len(tasks)}] {tasks[place].cell.label}: {what}")

    try:
        with handling(_stop_all):
            while waiting or running:
                while waiting and len(running) < jobs:
                    place = waiting.pop(0)
                    running[place] = _Running(tasks[place], lifeline)
                    tell(place, "started")
                for place, task in list(running.items()):
                    code = task.process.poll()
                    if code is None or (code == 0 and task.start_next()):
                        continue
                    del running[place]
                    if code:
                        failures[place] = task.reason(code)
                        tell(place, f"FAILED after {task.seconds:.0f} s: {failures[place]}")
                    else:
                        tell(place, f"done in {task.seconds:.0f} s")
                time.sleep(POLL_SECONDS)
    finally:
        _stop([task.process for task in running.values()])
        lifeline.close()
    return failures


def _stop_all(number: int) -> None:
    """Turn a request to stop into an exception, so that the cells are asked too."""
    raise StoppedOnRequest(
        "stopped on request; unfinished cells have saved what they had, the same command resumes them"
    )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask cells to save and stop, and end those that do not."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))
        if process.poll() is None:
            end_session(process)
