"""The command `launch slurm`: check a run for its nodes and write its job script, from `train.sbatch.j2`."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from pathlib import Path

from megatron_dynmix.errors import InputError

TEMPLATE = Path(__file__).parent / "train.sbatch.j2"
TIME = r"\d+(:\d\d?){0,2}|\d+-\d\d?(:\d\d?){0,2}|UNLIMITED|INFINITE"
"""As `sbatch` takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or none at all."""
STDOUT = Path("-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; every setting of RUN.yaml is one, too, and is written into the job script."""
    parser.add_argument("scheduler", choices=["slurm"])
    parser.add_argument("run_yaml", type=Path, metavar="RUN.yaml")
    parser.add_argument("--run-dir", type=Path, required=True, help="where everything is written")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="and ranks (8)")
    parser.add_argument("--time", help="limit of one start, as D-HH:MM:SS; the partition's if not given")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--save-seconds",
        type=int,
        default=300,
        help="what one iteration and one save may take at the end of the time (300)",
    )
    parser.add_argument("--gpu-memory-gb", type=float, metavar="GB", help="of each GPU (80)")
    parser.add_argument("--host", choices=["te", "cuda", "cpu"], help="what the nodes have, as for plan")
    parser.add_argument(
        "--output", type=Path, default=Path("train.sbatch"), metavar="FILE", help="- for the terminal"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Plan the run for the ranks that it will have, and write its job script."""
    from megatron_dynmix import platform

    command, output = _command(arguments, rest), arguments.output
    platform.start()
    from megatron_dynmix.commands.planning import plan_run
    from megatron_dynmix.plan.layout import Layout

    world_size = arguments.nodes * arguments.gpus_per_node
    with contextlib.redirect_stdout(sys.stderr if output == STDOUT else sys.stdout):
        config = plan_run(arguments, rest, world_size, as_json=False)
    text = _script(arguments, rest, command, Layout.of(config, world_size).describe())
    if output == STDOUT:
        print(text, end="")
        return 0
    if output.exists() and output.read_text(encoding="utf-8") != text:
        raise InputError(f"{output} is there already and differs; remove it, or give another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(f"\n{output} is written; submit it from this folder: sbatch {shlex.quote(str(output))}")
    return 0


def _command(arguments: argparse.Namespace, flags: list[str]) -> str:
    """Return the command line that asks for this job; refuse what would break a job script."""
    words = ["megatron-dynmix", "launch", "slurm", str(arguments.run_yaml)]
    for name in (
        "run_dir",
        "nodes",
        "gpus_per_node",
        "time",
        "partition",
        "account",
        "save_seconds",
        "output",
    ):
        flag, value = f"--{name.replace('_', '-')}", getattr(arguments, name)
        if isinstance(value, int) and value < 1:
            raise InputError(f"{flag} is {value}; it must be 1 or more")
        if isinstance(value, str):
            _check_word(flag, value)
        words += [] if value is None else [flag, str(value)]
    _check_word("the name of --run-dir", arguments.run_dir.name)
    if arguments.time is not None and not re.fullmatch(TIME, arguments.time):
        raise InputError(
            f"--time is {arguments.time!r}, which Slurm does not read; give D-HH:MM:SS, HH:MM:SS "
            "or a number of minutes"
        )
    command = shlex.join([*words, *flags])
    if not command.isprintable():
        raise InputError(f"{command!r} holds characters that would break a job script; rename it")
    return command


def _check_word(what: str, word: str) -> None:
    if not re.fullmatch(r"[\w.,:@+-]+", word):
        raise InputError(
            f"{what} is {word!r}; in a job script it may hold letters, digits and . , : @ + - only"
        )


def _script(arguments: argparse.Namespace, flags: list[str], command: str, layout: str) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda word: shlex.quote(str(word))
    output = "FILE" if arguments.output == STDOUT else shlex.quote(str(arguments.output))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        job=arguments, flags=flags, command=command, layout=layout, output=output
    )
