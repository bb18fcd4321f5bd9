"""The ways a command ends early, and the exit code of each."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75
"""The state is saved, run it again: EX_TEMPFAIL of sysexits.h, which schedulers can be told to requeue."""
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141
"""Nobody reads what it prints: 128 + SIGPIPE, as the shell says of programs that die of it."""


class InputError(ValueError):
    """A user's mistake: wrong path, number, name or combination.

    The message says what was given, why it cannot work and what would. The command line prints it
    without a traceback and exits with 2; every other exception is a fault of ours.
    """


class CommandFailed(RuntimeError):
    """What was asked for could not be done, though nothing is wrong with it: a full disk, a dead worker.

    The message says what happened and what would help; the command line prints it and exits with 1.
    """


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and which checkpoint holds the last good state.

    Every rank raises it, and the one whose message it is gives a text; the others end without a word.
    """


class StoppedOnRequest(Exception):
    """The run was asked to stop, and what it had done is saved."""
