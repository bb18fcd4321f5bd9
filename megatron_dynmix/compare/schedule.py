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


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    step: int
    started: float
    log_start: int
    """Bytes that were in the log before."""


def run_tasks(tasks: Sequence[Task], jobs: int, say: Callable[[str], None]) -> dict[int, str]:
    """Carry out the tasks, `jobs` at a time, in their order.

    Args:
        tasks: of all cells.
        jobs: cells at a time; each is one process and its ranks.
        say: prints a line.

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
    try:
        with handling(_stop_all):
            while waiting or running:
                while waiting and len(running) < jobs:
                    place = waiting.pop(0)
                    running[place] = _start(tasks[place], 0, lifeline, time.monotonic())
                    say(f"[{_done(tasks, waiting, running)}] {tasks[place].cell.label}: started")
                for place, current in list(running.items()):
                    code = current.process.poll()
                    if code is None:
                        continue
                    step = current.step + 1
                    if code == 0 and step < len(current.task.commands):
                        running[place] = _start(current.task, step, lifeline, current.started)
                        continue
                    del running[place]
                    seconds = time.monotonic() - current.started
                    end = f"done in {seconds:.0f} s"
                    if code:
                        failures[place] = _reason(current, code)
                        end = f"FAILED after {seconds:.0f} s: {failures[place]}"
                    say(f"[{_done(tasks, waiting, running)}] {current.task.cell.label}: {end}")
                time.sleep(POLL_SECONDS)
    finally:
        _stop([current.process for current in running.values()])
        lifeline.close()
    return failures


def _done(tasks: Sequence[Task], waiting: Sequence[int], running: dict[int, _Running]) -> str:
    return f"{len(tasks) - len(waiting) - len(running)}/{len(tasks)}"


def _start(task: Task, step: int, lifeline: Lifeline, started: float) -> _Running:
    task.cell.run_dir.mkdir(parents=True, exist_ok=True)
    with task.cell.log.open("ab") as log:
        log_start = log.tell()
        process = lifeline.start(task.commands[step], {}, log)
    return _Running(task, process, step, started, log_start)


def _reason(current: _Running, code: int) -> str:
    """The last words of a process that failed: its message, or the end of what it said."""
    log = current.task.cell.log
    said = log.read_bytes()[current.log_start :].decode("utf-8", errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    messages = [line for line in lines if line.startswith("megatron-dynmix")]
    last = (messages or lines or ["it said nothing"])[-1]
    end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{last.removeprefix('megatron-dynmix: ')} ({end}; {log})"


def _stop_all(number: int) -> None:
    """Turn a request to stop into an exception, so that the cells are asked too."""
    raise StoppedOnRequest(
        "stopped on request; unfinished cells have saved what they had, the same command goes on"
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
