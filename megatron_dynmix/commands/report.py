"""The command `report`: its arguments, and what it does with them.

Heavy imports wait inside the functions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_dynmix.errors import InputError
from megatron_dynmix.report import REPORT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `report` takes."""
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help=f"default RUN/{REPORT}; of several runs, {REPORT} in the current folder",
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Write the page of one run, or of several side by side."""
    from megatron_dynmix.report.pages import page_of_run, page_of_runs, write_page
    from megatron_dynmix.report.run import read_run

    run_dirs: list[Path] = arguments.run_dirs
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise InputError(f"{' '.join(map(str, run_dirs))}: a run is given twice; give each once")
    runs = [read_run(path) for path in run_dirs]
    now = time.time()
    page = page_of_run(runs[0], now) if len(runs) == 1 else page_of_runs(runs, now)
    output: Path = arguments.output or (run_dirs[0] / REPORT if len(runs) == 1 else Path(REPORT))
    written = write_page(page, output)
    for run in runs:
        for sentence in run.missing:
            print(f"{run.path}: {sentence}")
    print(written)
    return 0
