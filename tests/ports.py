"""Ports for jobs of the tests."""

import contextlib
import itertools
import os
import socket

FIRST, LAST = 20000, 29999
"""Below those that the system gives to connections: one of these may come between asking and use."""
_next = itertools.count(os.getpid() * 97)  # processes that run tests side by side begin far from each other


def free_port():
    """A port that nobody listens on, another one each time."""
    for number in itertools.islice(_next, LAST + 1 - FIRST):
        port = FIRST + number % (LAST + 1 - FIRST)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
