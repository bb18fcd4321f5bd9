"""The command `doctor`: one table of everything that was checked."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dynmix.commands.launch import join_srun
from megatron_dynmix.doctor.checks import Finding, good, problem, warning
from megatron_dynmix.errors import EXIT_FAILED, InputError

if TYPE_CHECKING:  # `--help` must not wait for torch
    from megatron_dynmix.config import RunConfig
    from megatron_dynmix.doctor.machine import Machine

SHORT_MINUTES = 5.0
MARKS = {"OK": "ok", "warning": "WARNING", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run and the folder to check for."""
    parser.add_argument(
        "run_yaml", nargs="?", type=Path, metavar="RUN.yaml", help="check what this run needs, too"
    )
    parser.add_argument("--shared-dir", type=Path, metavar="DIR", help="a folder that all ranks share")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Check this machine and print the table; returns 1 if anything is a problem.

    Raises:
        InputError: a RUN.yaml that cannot be read, flags without one.

    """
    join_srun()
    if rest and arguments.run_yaml is None:
        raise InputError(f"{' '.join(rest)}: settings are flags only beside a RUN.yaml")
    from megatron_dynmix.doctor.checks import check_devices, check_job, check_packages
    from megatron_dynmix.doctor.machine import look
    from megatron_dynmix.doctor.ranks import check_ranks

    machine = look()
    of_job = check_job(machine)
    findings = [*check_packages(machine), *check_devices(machine), *of_job]
    config = _read(arguments.run_yaml, rest) if arguments.run_yaml else None
    findings += _folders(config, arguments.shared_dir, machine)
    if config is not None:
        findings += check_run(config, machine)
    meets = not any(finding.status == "problem" for finding in of_job)  # or it would only wait
    if "RANK" in os.environ and meets:
        findings += check_ranks(machine, findings, shared_folder(config, arguments.shared_dir))
    if os.environ.get("RANK", "0") == "0" or not meets:
        print(findings_text(findings))
    return EXIT_FAILED if any(finding.status == "problem" for finding in findings) else 0


def _read(run_yaml: Path, flags: list[str]) -> RunConfig:
    """Not before the packages were looked at: without megatron-core nothing can be read."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.config.load import load_config

    return load_config(run_yaml, flags)


def findings_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, the remedy below what is not well, and the sum of it all."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.status]:<8} {finding.name:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    problems = sum(finding.status == "problem" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    lines.append(f"\n{len(findings)} checks: {problems} problems, {warnings} warnings")
    return "\n".join(lines)


def check_run(config: RunConfig, machine: Machine) -> list[Finding]:
    """Whether this machine can follow the settings of a run."""
    from megatron_dynmix import platform
    from megatron_dynmix.config.host import Host, check_host

    here = platform.start()
    host = Host(
        cuda=here.device.type == "cuda",
        transformer_engine=here.transformer_engine,
        deep_ep="deep-ep" in machine.versions,
    )
    findings = []
    try:
        check_host(config, host)
        findings.append(good("RUN.yaml", "this machine can follow every setting"))
    except InputError as error:
        findings.append(problem("RUN.yaml", str(error), "or run it on a machine that has what is missing"))
    minutes = config.parallel.distributed_timeout_minutes
    if minutes < SHORT_MINUTES:
        found = f"distributed_timeout_minutes is {minutes:g}: a slow save or start looks like a lost rank"
        findings.append(warning("run's time-out", found, "leave it out (10), or give more for large models"))
    tp, cp = (config.parallel.size(f"{name}_parallel_size") for name in ("tensor_model", "context"))
    if host.cuda and max(tp, cp) > 1 and machine.environment.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        found = "CUDA_DEVICE_MAX_CONNECTIONS is not 1, with tensor or context parallelism"
        remedy = (
            "export CUDA_DEVICE_MAX_CONNECTIONS=1: on Hopper and older, sends and kernels overlap only so"
        )
        findings.append(warning("connections", found, remedy))
    return findings


def shared_folder(config: RunConfig | None, shared_dir: Path | None) -> Path | None:
    """The folder that was named, or that of prepared data."""
    return shared_dir or (Path(config.data.prepared_dir) if config else None)


def _folders(config: RunConfig | None, shared_dir: Path | None, machine: Machine) -> list[Finding]:
    from megatron_dynmix.doctor.storage import check_folder, try_folder

    folder = shared_folder(config, shared_dir)
    if folder is None:
        return [good("shared folder", "not tried: give --shared-dir DIR or RUN.yaml")]
    if shared_dir is not None and not shared_dir.is_dir():
        return [
            problem("shared folder", f"{shared_dir} is no folder", "make it, or give another --shared-dir")
        ]
    size = None
    if config is not None:
        from megatron_dynmix.plan.memory import checkpoint_bytes
        from megatron_dynmix.plan.parameters import model_parameters

        try:
            size = checkpoint_bytes(config, model_parameters(config))
        except InputError as error:
            return [problem("RUN.yaml", str(error), "plan RUN.yaml --world-size N says more")]
    return check_folder(try_folder(folder), machine.environment, size)
