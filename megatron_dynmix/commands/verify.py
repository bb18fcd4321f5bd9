"""The command `verify`: replay a run from its directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dynmix.errors import EXIT_FAILED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run directory."""
    parser.add_argument("run_dir", type=Path, metavar="RUN")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print the verdict; exit 1 if what was drawn is not what the weights call for."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.verify.verdict import verdict_text
    from megatron_dynmix.verify.verify import verify

    verdict = verify(arguments.run_dir)
    print(verdict_text(verdict))
    return 0 if verdict.proven else EXIT_FAILED
