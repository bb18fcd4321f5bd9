"""The ranks of one machine: started together, told of signals, ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import IO

from megatron_dynmix.errors import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_STOPPED, TrainingStopped
from megatron_dynmix.job.signals import handling

LIFELINE = "MEGATRON_DYNMIX_LIFELINE"
"""Environment variable of a rank: a pipe that ends when its launcher does."""
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
"""How long the other ranks have to say what they know and to end, once one has."""
AS_WHEN = {
    "SIGKILL": ", as when memory runs out",
    "SIGBUS": ", as when shared memory (df -h /dev/shm) or the disk of a file in memory is full",
}
DEFAULTS = {
    "OMP_NUM_THREADS": "1",
    # without it torch reports every lost connection with the frames of its own stack
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def launch_ranks(command: Sequence[str], nproc: int) -> int:
    """Run `command` as `nproc` ranks that meet on this machine; return the exit code of them all.

    SIGTERM and SIGUSR1 are passed on to the ranks; an interrupt ends them. Nothing that they have started
    outlives this call. `TrainingStopped`: a rank failed or was killed.
    """
    from torch.distributed import TCPStore

    # Hosted here, not by rank 0: when that is gone it can still be asked. It finds a free port itself.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    ranks: list[subprocess.Popen[bytes]] = []
    passed: list[int] = []

    def pass_on(number: int) -> None:
        passed.append(number)
        for process in ranks:
            process.send_signal(number)  # not to helpers, which could not answer

    lifeline = Lifeline()
    try:
        with handling(pass_on):
            for rank in range(nproc):
                ranks.append(lifeline.start(command, _place(rank, nproc, store.port)))
            return _wait(ranks, passed)
    finally:
        for process in ranks:
            end_session(process)
        lifeline.close()


class Lifeline:
    """Starts processes that end when this one does, even if it is killed: see `end_with_launcher`."""

    def __init__(self) -> None:
        self._watched, self._held = os.pipe()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process with more in its environment; with a log it has no terminal."""
        return subprocess.Popen(
            command,
            env={**DEFAULTS, **os.environ, **environment, LIFELINE: str(self._watched)},
            stdin=None if log is None else subprocess.DEVNULL,
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            # a session of its own: a terminal's Ctrl-C reaches us alone, and its helpers can be ended
            start_new_session=True,
            pass_fds=[self._watched],
        )

    def close(self) -> None:
        """End what is left of the processes."""
        os.close(self._watched)
        os.close(self._held)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process that a `Lifeline` started, and its helpers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_with_launcher() -> None:
    """In a rank: end, helpers included, when the launcher does, even if it was killed."""
    if LIFELINE not in os.environ:
        return
    ends = int(os.environ.pop(LIFELINE))

    def watch() -> None:
        os.read(ends, 1)  # nothing is ever written: it returns when the other end is gone
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _place(rank: int, nproc: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]], passed: Sequence[int]) -> int:
    """Wait for all ranks, or for the first that does not end well and then briefly for the others."""
    while not (failed := [rank for rank, process in enumerate(ranks) if process.poll()]):
        if all(process.returncode == 0 for process in ranks):
            return 0
        time.sleep(POLL_SECONDS)
    rank = min(failed, key=lambda rank: ranks[rank].returncode)  # of several, one that was killed
    code = ranks[rank].returncode
    deadline = time.monotonic() + GRACE_SECONDS
    while code > 0 and time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(POLL_SECONDS)
    if -code in passed:  # the request came before the rank could hear it
        return EXIT_STOPPED
    if code in (EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED):
        return code
    end = f"failed with exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name
        end = f"was killed by {name}{AS_WHEN.get(name, '')}"
    others = "" if len(ranks) == 1 else "; the other ranks were ended"
    raise TrainingStopped(
        f"rank {rank} (pid {ranks[rank].pid}) {end}{others}. Go on from the last checkpoint with "
        "--resume auto"
    )
