"""The console script: a table of the commands, each a module of `commands/`, and how they end.

A command's module offers `add_arguments(parser)` and `run(arguments, rest) -> exit code`. Only the module of
the command that is called is imported, and it imports what is heavy when it runs: `--help` waits for neither.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

from megatron_dynmix import __version__
from megatron_dynmix.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    EXIT_UNREAD,
    CommandFailed,
    InputError,
    StoppedOnRequest,
    TrainingStopped,
)
from megatron_dynmix.job.resources import exhausted
from megatron_dynmix.job.streams import OutputLost, secure_output

COMMANDS = {
    "quickstart": ("train a tiny MoE on four generated sources, on two ranks", False),
    "prepare": ("turn sources into tokens on disk", True),
    "train": ("train; a setting of RUN.yaml is a flag of Megatron-LM", True),
    "plan": ("check a layout and estimate memory, tokens and updates, without a GPU", True),
    "doctor": ("check this machine, with the remedy for what is wrong", True),
    "verify": ("prove from a run's directory that it drew what its weights call for", False),
    "launch": ("check a run and write its job script", True),
    "report": ("explain a run, or several side by side, on one HTML page", False),
    "compare": ("run strategies x seeds, and set them side by side", True),
    "similarity": ("which sources are redundant, by how they load a model's experts", True),
    "whatif": ("what other rules would have made of the signals of a run", False),
    "evaluate": ("held-out loss of each source of a run, or its answers to tasks", False),
    "convert": ("weights of Hugging Face folders in and out, with a verdict", False),
    "inspect": ("show an example, a packed row or a batch as text", True),
    "update": ("one weight update on given loads or losses, no model", True),
}
"""Summary of each command, and whether flags that it does not declare are settings for it to read."""
MAKES_FILES = ("quickstart", "prepare", "train", "compare", "evaluate", "convert")
"""Commands that go on when what they print cannot be written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if "" not in sys.path:
        sys.path.append("")  # strategies of your own may lie in the current folder, as for `python -m`
    own_process = argv is None
    argv = sys.argv[1:] if argv is None else argv
    name = next((word for word in argv if word in COMMANDS), "")
    if own_process:
        secure_output(goes_on=name in MAKES_FILES)
    parser = parser_of([name])
    arguments, rest = parser.parse_known_args(argv)
    _, takes_flags = COMMANDS[name]
    if rest and not takes_flags:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        code = _run(name, arguments, rest)
        sys.stdout.flush()
        return code
    except OutputLost as lost:
        if lost.errno == errno.EPIPE:
            return EXIT_UNREAD
        return _end(EXIT_FAILED, f"standard output cannot be written ({lost.strerror})")


def _run(name: str, arguments: argparse.Namespace, rest: list[str]) -> int:
    """Run a command; say why it ends early, if it does, and return its exit code."""
    try:
        return int(_module(name).run(arguments, rest))
    except InputError as error:
        return _end(EXIT_REFUSED, str(error))
    except CommandFailed as error:
        return _end(EXIT_FAILED, str(error))
    except TrainingStopped as error:
        return _end(EXIT_FAILED, f"stopped: {error}" if str(error) else "")
    except StoppedOnRequest as error:
        return _end(EXIT_STOPPED, _once(str(error)))
    except KeyboardInterrupt as interrupt:
        if sys.stderr.isatty() and "RANK" not in os.environ:
            print(file=sys.stderr)  # the terminal shows ^C in the line that is being written
        return _end(EXIT_INTERRUPTED, _once(f"interrupted{interrupt}"))
    except OutputLost:
        raise
    except Exception as error:
        if used_up := exhausted(error):
            return _end(EXIT_FAILED, used_up)
        raise


def parser_of(names: Collection[str]) -> argparse.ArgumentParser:
    """Return a parser that knows all commands, and the arguments of the named ones."""
    parser = argparse.ArgumentParser(
        prog="megatron-dynmix", description="Dynamic data mixing for MoE fine-tuning."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (summary, _) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name in names:
            _module(name).add_arguments(command)
    return parser


def _module(name: str) -> Any:
    return importlib.import_module(f"megatron_dynmix.commands.{name}")


def _end(code: int, message: str) -> int:
    """Say why, and from which rank; of several ranks that end together, one has something to say."""
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    if message:
        print(f"megatron-dynmix{rank}: {message}", file=sys.stderr)
    return code


def _once(message: str) -> str:
    """Return what all ranks would say alike on one of them, and nothing on the others."""
    return message if os.environ.get("RANK", "0") == "0" else ""
