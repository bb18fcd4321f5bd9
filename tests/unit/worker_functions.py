"""What the tests of `workers` share out; light, because every worker imports it."""

import os
import signal
import sys
import time
from collections.abc import Iterator

from megatron_dynmix.data.prepare.workers import map_in_order
from megatron_dynmix.errors import InputError

NAME = "worker_functions"


def kill_yourself(_: object) -> None:
    """Die as a process does that the system kills for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse_three(item: int) -> int:
    """Take any item but one."""
    if item == 3:
        raise InputError("item 3 is bad")
    return item


def wait_a_little(item: int) -> int:
    """Take some time."""
    time.sleep(0.05)
    return item


def endless() -> Iterator[int]:
    """Items without end."""
    while True:
        yield 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        for _ in map_in_order(wait_a_little, endless(), 2, preload=NAME):
            print("working", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
