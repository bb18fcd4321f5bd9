"""The command `inspect`: an example, a row or a batch as text."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be looked at."""
    parser.add_argument("target", type=Path, metavar="PREFIX|RUN.yaml|RUN_DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--example", metavar="N", help="of a prepared PREFIX; SOURCE:N of a run")
    what.add_argument("--row", metavar="SOURCE:N", help="packed row N of a source")
    what.add_argument("--batch", type=int, metavar="ITERATION", help="the global batch of an iteration")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR")
    parser.add_argument("--plain", action="store_true", help="marks instead of colors")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print it: in colors on a terminal, with marks elsewhere."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.commands.inspection import inspect
    from megatron_dynmix.data.row_text import show

    given = {name: getattr(arguments, name) for name in ("tokenizer", "example", "row", "batch")}
    show(inspect(arguments.target, rest, **given), in_colour=not arguments.plain)
    return 0
