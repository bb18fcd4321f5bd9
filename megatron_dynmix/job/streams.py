"""Standard output and error of a process: what it does need not end because nobody reads what it says."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from megatron_dynmix.files import FULL

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDOUT, STDERR = 1, 2


class OutputLost(OSError):
    """What a command prints is all that it is for, and it cannot be printed."""


def secure_output(*, goes_on: bool) -> None:
    """Let printing fail without an error, for a command that `goes_on`; else raise `OutputLost` once.

    A full disk is tried again with the next text; a pipe that nobody reads any more stays closed. What is
    closed from the start is opened to nowhere, or the next file would be taken for standard output.
    """
    for descriptor in (0, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    sys.stdout = _text(STDOUT, sys.stdout, goes_on=goes_on)
    sys.stderr = _text(STDERR, sys.stderr, goes_on=True)


def _text(descriptor: int, before: object, *, goes_on: bool) -> io.TextIOWrapper:
    stream = io.BufferedWriter(_Stream(descriptor, goes_on=goes_on))
    lacking = "backslashreplace"  # a name that the encoding of the log cannot write ends no run
    if not isinstance(before, io.TextIOWrapper):  # it was closed
        return io.TextIOWrapper(stream, encoding="utf-8", errors=lacking)
    by_line = before.line_buffering or before.write_through
    return io.TextIOWrapper(stream, before.encoding, lacking, line_buffering=by_line)


class _Stream(io.RawIOBase):
    """Writes to a descriptor for as long as that takes it."""

    def __init__(self, descriptor: int, *, goes_on: bool) -> None:
        self._descriptor, self._goes_on, self._told = descriptor, goes_on, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if not self._goes_on or error.errno not in FULL:
                # what C code or a child process prints must not fail either
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._descriptor)
                os.close(nowhere)
            if not self._goes_on:
                raise OutputLost(error.errno, error.strerror) from None
            if self._descriptor == STDOUT and not self._told:
                self._told = True
                rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
                print(
                    f"megatron-dynmix{rank}: standard output cannot be written ({error.strerror}); the work "
                    "goes on, and what it makes is in files",
                    file=sys.stderr,
                )
            return len(memoryview(data))
