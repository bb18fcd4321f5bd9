"""The command `launch slurm`: check a run for its nodes and write its job script, from `train.sbatch.j2`."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dynmix.errors import InputError

if TYPE_CHECKING:  # `--help` must not wait for Megatron-Core
    from megatron_dynmix.config import RunConfig

TEMPLATE = Path(__file__).parent / "train.sbatch.j2"
TIME = r"\d+(:\d\d?){0,2}|\d+-\d\d?(:\d\d?){0,2}|UNLIMITED|INFINITE"
"""As `sbatch` takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or none at all."""
GPUS_PER_NODE = 8
SAVE_SECONDS = 300
STDOUT = Path("-")


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What the scheduler is asked for, and what runs there."""

    run_yaml: Path
    run_dir: Path
    nodes: int
    gpus_per_node: int = GPUS_PER_NODE
    time: str | None = None
    """As Slurm writes it; the partition's limit if not given."""
    partition: str | None = None
    account: str | None = None
    save_seconds: int = SAVE_SECONDS
    """How long one iteration and one save may take, once the job is asked to stop."""
    output: Path = STDOUT
    flags: tuple[str, ...] = ()
    """Settings that win over the YAML file."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "save_seconds"):
            if getattr(self, name) < 1:
                raise InputError(f"{_flag(name)} is {getattr(self, name)}; it must be 1 or more")
        for name in ("time", "partition", "account", "job_name"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:@+-]+", value):
                given = "the name of --run-dir" if name == "job_name" else _flag(name)
                raise InputError(
                    f"{given} is {value!r}; in a job script it may hold letters, digits and . , : @ + - only"
                )
        if self.time is not None and not re.fullmatch(TIME, self.time):
            raise InputError(
                f"--time is {self.time!r}, which Slurm does not read; give D-HH:MM:SS, HH:MM:SS "
                "or a number of minutes"
            )
        if not self.command.isprintable():
            raise InputError(f"{self.command!r} holds characters that would break a job script; rename it")

    @property
    def world_size(self) -> int:
        """Return how many ranks there are: one for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def job_name(self) -> str:
        """Return the run's own name, which logs are called by too."""
        return self.run_dir.name

    @property
    def command(self) -> str:
        """Return the command line that asks for this job."""
        words = ["megatron-dynmix", "launch", "slurm", str(self.run_yaml), "--run-dir", str(self.run_dir)]
        words += ["--nodes", str(self.nodes), "--gpus-per-node", str(self.gpus_per_node)]
        for name in ("time", "partition", "account"):
            if (value := getattr(self, name)) is not None:
                words += [_flag(name), value]
        words += ["--save-seconds", str(self.save_seconds), "--output", str(self.output), *self.flags]
        return shlex.join(words)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; every setting of RUN.yaml is one, too, and is written into the job script."""
    parser.add_argument("scheduler", choices=["slurm"])
    parser.add_argument("run_yaml", type=Path, metavar="RUN.yaml")
    parser.add_argument("--run-dir", type=Path, required=True, help="where everything is written")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=GPUS_PER_NODE, help="and ranks (8)")
    parser.add_argument("--time", help="limit of one start, as D-HH:MM:SS; the partition's if not given")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--save-seconds",
        type=int,
        default=SAVE_SECONDS,
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

    platform.start()
    from megatron_dynmix.commands.planning import plan_run

    names = ("run_yaml", "run_dir", "nodes", "gpus_per_node", "time", "partition", "account")
    given = {name: getattr(arguments, name) for name in (*names, "save_seconds", "output")}
    job = SlurmJob(**given, flags=tuple(rest))
    with contextlib.redirect_stdout(sys.stderr if job.output == STDOUT else sys.stdout):
        config = plan_run(
            job.run_yaml,
            rest,
            world_size=job.world_size,
            gpu_memory_gb=arguments.gpu_memory_gb,
            host=arguments.host,
        )
    text = sbatch_text(job, config)
    if job.output == STDOUT:
        print(text, end="")
        return 0
    _write(job.output, text)
    print(f"\n{job.output} is written; submit it from this folder: sbatch {shlex.quote(str(job.output))}")
    return 0


def sbatch_text(job: SlurmJob, config: RunConfig) -> str:
    """Return the job script of a run that was checked."""
    from jinja2 import Environment, StrictUndefined

    from megatron_dynmix.plan.layout import Layout

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda word: shlex.quote(str(word))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        job=job,
        layout=Layout.of(config, job.world_size).describe(),
        output="FILE" if job.output == STDOUT else shlex.quote(str(job.output)),
    )


def _write(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{path} is there already and differs; remove it, or give another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
