"""The command `compare`: its arguments, and what it does with them.

Heavy imports wait inside the functions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dynmix.commands.evaluate import add_tasks, tasks_of
from megatron_dynmix.errors import EXIT_FAILED, InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `compare` takes beside the flags of `train`."""
    parser.add_argument("run_yaml", type=Path, metavar="RUN.yaml")
    add_variants(parser, "variants")
    parser.add_argument("--seeds", required=True, help="each variant is run with each: 1,2,3")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks of each run")
    add_tasks(parser)


def add_variants(parser: argparse.ArgumentParser, called: str) -> None:
    """Declare what `variants_of` reads; `called` is what the command calls them."""
    parser.add_argument("--strategies", help="a,b:option=value,option=value")
    parser.add_argument(
        "--grid",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.yaml",
        help=f"named {called}, {{name: {{setting: value}}}}; may be given several times",
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Run a grid of variants and seeds; exit 1 if a run failed."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.compare.comparison import compare
    from megatron_dynmix.compare.grid import Grid, parse_seeds, variants_of

    for name in ("jobs", "nproc_per_node"):
        if (value := getattr(arguments, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    variants = variants_of(arguments.grid, arguments.strategies)
    grid = Grid(
        run_yaml=arguments.run_yaml,
        output=arguments.output,
        flags=tuple(rest),
        nproc=arguments.nproc_per_node,
        benchmarks=tasks_of(arguments),
    )
    finished = compare(grid, variants, parse_seeds(arguments.seeds), jobs=arguments.jobs, say=_say)
    return 0 if finished else EXIT_FAILED


def _say(text: str) -> None:
    print(text, flush=True)
