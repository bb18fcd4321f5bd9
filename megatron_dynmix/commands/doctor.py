"""The command `doctor`: one table of everything that was checked."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dynmix.errors import EXIT_FAILED, InputError
from megatron_dynmix.job.rendezvous import join_srun

if TYPE_CHECKING:  # `--help` must not wait for torch
    from megatron_dynmix.doctor.checks import Finding
    from megatron_dynmix.doctor.facts import Facts

MARKS = {"OK": "ok", "warning": "WARNING", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run and the folder to check for."""
    parser.add_argument(
        "run_yaml", nargs="?", type=Path, metavar="RUN.yaml", help="check what this run needs, too"
    )
    parser.add_argument("--shared-dir", type=Path, metavar="DIR", help="a folder that all ranks share")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Check this machine and print the table; exit 1 if anything is a problem."""
    join_srun()
    if rest and arguments.run_yaml is None:
        raise InputError(f"{' '.join(rest)}: settings are flags only beside a RUN.yaml")
    from megatron_dynmix.doctor.checks import FOR_MEETING, findings_of
    from megatron_dynmix.doctor.ranks import check_ranks

    facts = _facts(arguments.run_yaml, rest, arguments.shared_dir)
    findings = findings_of(facts)
    problems = {finding.name for finding in findings if finding.status == "problem"}
    meets = problems.isdisjoint(FOR_MEETING)
    if "RANK" in os.environ and meets:
        findings += check_ranks(facts, findings)
    if os.environ.get("RANK", "0") == "0" or not meets:
        print(findings_text(findings))
    return EXIT_FAILED if any(finding.status == "problem" for finding in findings) else 0


def _facts(run_yaml: Path | None, flags: list[str], shared_dir: Path | None) -> Facts:
    """Look at this machine, the run and the folder."""
    from megatron_dynmix import platform
    from megatron_dynmix.doctor.facts import look, try_folder

    facts = dataclasses.replace(look(), shared_dir=shared_dir)
    if run_yaml is not None:
        platform.start()
        from megatron_dynmix.config.load import load_config
        from megatron_dynmix.plan.memory import checkpoint_bytes
        from megatron_dynmix.plan.parameters import model_parameters

        config = load_config(run_yaml, flags)
        size, why = None, ""
        try:
            size = checkpoint_bytes(config, model_parameters(config))
        except InputError as error:
            why = str(error)
        folder = shared_dir or Path(config.data.prepared_dir)
        facts = dataclasses.replace(
            facts, config=config, shared_dir=folder, checkpoint_bytes=size, model_error=why
        )
    if facts.shared_dir is None or (shared_dir is not None and not shared_dir.is_dir()):
        return facts
    return dataclasses.replace(facts, folder=try_folder(facts.shared_dir))


def findings_text(findings: Sequence[Finding]) -> str:
    """Return a line for each finding, the remedy below what is not well, and the sum of it all."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.status]:<8} {finding.name:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    problems, warnings = (sum(one.status == status for one in findings) for status in ("problem", "warning"))
    lines.append(f"\n{len(findings)} checks: {problems} problems, {warnings} warnings")
    return "\n".join(lines)
