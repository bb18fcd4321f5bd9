"""The command `train`: train on this rank, or check everything and start the ranks of this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dynmix.job.launch import end_with_launcher
from megatron_dynmix.job.rendezvous import is_rank, join_srun, world_size_for
from megatron_dynmix.job.signals import stopping_at_once

if TYPE_CHECKING:
    from megatron_dynmix.training.resume import Resume

INTERRUPTED = ", not saved; --resume auto goes on from the last checkpoint, or starts over"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `train` takes beside the settings of RUN.yaml."""
    parser.add_argument("run_yaml", type=Path, metavar="RUN.yaml")
    parser.add_argument("--run-dir", type=Path, required=True, help="where everything is written")
    parser.add_argument("--nproc-per-node", type=int, help="start this many ranks here")
    parser.add_argument("--resume", choices=["no", "must", "auto"], default="no")
    parser.add_argument(
        "--allow-source-change", action="store_true", help="resume although the data are not what they were"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Train on this rank, or start the ranks of this machine."""
    try:
        end_with_launcher()
        with stopping_at_once():
            return _train(arguments, rest)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(INTERRUPTED) from None


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    nproc = arguments.nproc_per_node
    if nproc is None:
        join_srun()
    return train(
        *(arguments.run_yaml, rest, arguments.run_dir),
        world_size=world_size_for(nproc),
        resume=arguments.resume,
        allow_source_change=arguments.allow_source_change,
    )


def train(
    run_yaml: Path,
    flags: Sequence[str],
    run_dir: Path,
    *,
    world_size: int,
    resume: Resume = "no",
    allow_source_change: bool = False,
) -> int:
    """Check everything here, where it can be refused in one message; then train, or start the ranks.

    A rank of a started job trains, and so does this process if the job has one rank only.
    """
    from megatron_dynmix.config.check import check_run
    from megatron_dynmix.config.load import load_config

    config = load_config(run_yaml, flags)
    check_run(config, world_size)  # before torch is imported, which takes seconds
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.training.setup import set_up

    prepared = set_up(config, run_dir, resume=resume, allow_source_change=allow_source_change)
    if world_size > 1 and not is_rank():
        from megatron_dynmix.job.launch import launch_ranks

        command = [
            *(sys.executable, "-m", "megatron_dynmix", "train", str(run_yaml), "--run-dir", str(run_dir)),
            *("--resume", resume, *(["--allow-source-change"] if allow_source_change else []), *flags),
        ]
        return launch_ranks(command, world_size)
    from megatron_dynmix.training import run

    run.train(prepared, run_dir, resume=resume, allow_source_change=allow_source_change)
    return 0
