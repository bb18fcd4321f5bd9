"""The command `train`: train on this rank, or check everything and start the ranks of this machine."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dynmix.commands.launch import join_srun
from megatron_dynmix.errors import InputError

if TYPE_CHECKING:
    from megatron_dynmix.training.resume import Resume

INTERRUPTED = ", not saved; --resume auto goes on from the last checkpoint, or begins anew"


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
    from megatron_dynmix.job.launch import end_with_launcher
    from megatron_dynmix.job.signals import stopping_at_once

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
    joined = "RANK" in os.environ
    if nproc is not None and joined:
        raise InputError(
            f"--nproc-per-node {nproc} is given, but this is a rank of a started job; leave it out"
        )
    if nproc is not None and nproc < 1:
        raise InputError(f"--nproc-per-node is {nproc}; it must be 1 or more")
    run_yaml, run_dir, resume = arguments.run_yaml, arguments.run_dir, arguments.resume
    allow_source_change = arguments.allow_source_change
    if joined:
        return train_here(run_yaml, run_dir, resume, rest, allow_source_change=allow_source_change)
    return start_ranks(run_yaml, run_dir, nproc or 1, resume, rest, allow_source_change=allow_source_change)


def train_here(
    run_yaml: Path, run_dir: Path, resume: Resume, flags: list[str], *, allow_source_change: bool
) -> int:
    """Train on this rank."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.config.load import load_config
    from megatron_dynmix.training import run

    config = load_config(run_yaml, flags)
    run.train(config, run_dir, resume=resume, allow_source_change=allow_source_change)
    return 0


def start_ranks(
    run_yaml: Path,
    run_dir: Path,
    nproc: int,
    resume: Resume,
    flags: list[str],
    *,
    allow_source_change: bool = False,
) -> int:
    """Check everything here, where it can be refused in one message, then start the ranks.

    One rank trains in this process.
    """
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.config.load import load_config
    from megatron_dynmix.convert.export_hf import check_save_hf
    from megatron_dynmix.job.launch import launch_ranks
    from megatron_dynmix.training import run
    from megatron_dynmix.training.resume import begins, check_resume, check_run_dir

    config = load_config(run_yaml, flags)
    tokenizer = run.check_before_start(config, nproc, fresh=begins(run_dir, resume))
    check_run_dir(run_dir, resume)
    check_save_hf(config, run_dir)
    data = run.read_data(config, tokenizer)
    check_resume(config, data.reports, run_dir, resume, allow_source_change=allow_source_change)
    if nproc == 1:
        return train_here(run_yaml, run_dir, resume, flags, allow_source_change=allow_source_change)
    command = [
        *(sys.executable, "-m", "megatron_dynmix", "train", str(run_yaml), "--run-dir", str(run_dir)),
        *("--resume", resume, *(["--allow-source-change"] if allow_source_change else []), *flags),
    ]
    return launch_ranks(command, nproc)
