"""A whole comparison: the grid is checked, carried out, read and set side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime

from megatron_dynmix.compare.cell import Cell
from megatron_dynmix.compare.grid import Grid, Variant
from megatron_dynmix.compare.harness import check_benchmarks
from megatron_dynmix.compare.page import markdown, page_of_comparison
from megatron_dynmix.compare.results import Comparison, Failure, compared, read_result
from megatron_dynmix.compare.schedule import Task, run_tasks
from megatron_dynmix.config.check import check_run
from megatron_dynmix.config.load import to_dict
from megatron_dynmix.convert.export_hf import check_export
from megatron_dynmix.data.prepared import SourceReport
from megatron_dynmix.data.sources import Data
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import write_atomically
from megatron_dynmix.lease import LOCK, Lease
from megatron_dynmix.report.pages import html
from megatron_dynmix.training.resume import begins
from megatron_dynmix.training.setup import check_before_start, prepare_run


def compare(
    grid: Grid, variants: Sequence[Variant], seeds: Sequence[int], *, jobs: int, say: Callable[[str], None]
) -> bool:
    """Run what is not finished of the grid, and write `comparison.json`, `.md` and `.html`.

    Args:
        grid: what all cells share.
        variants: rows of the comparison.
        seeds: each variant is run with each.
        jobs: cells at a time.
        say: prints a line.

    Returns:
        Whether every cell is finished.

    Raises:
        InputError: before any cell is started: settings that cannot be used, a cell's directory holds
            another run, or another comparison is at work there.

    """
    lease = Lease(grid.output / LOCK, "a comparison", "give another --output")
    lease.refuse_if_held()
    if grid.benchmarks is not None:
        check_benchmarks(grid.benchmarks)
    cells = [Cell.of(grid, variant, seed) for variant in variants for seed in seeds]
    reports = _check(cells)
    try:
        lease.take(say=say)
    except OSError as error:
        raise InputError(f"{lease.path} cannot be made ({error.strerror}); give another --output") from None
    with lease:
        return not _carried_out(grid, cells, reports, jobs, say, lease)


def _carried_out(
    grid: Grid,
    cells: Sequence[Cell],
    reports: dict[str, list[SourceReport]],
    jobs: int,
    say: Callable[[str], None],
    lease: Lease,
) -> list[Failure]:
    """Run what is not finished, write the comparison, and return what failed."""
    tasks = [_task(cell, reports[cell.variant.name]) for cell in cells]
    kept = sum(not task.commands for task in tasks)
    say(f"{len(cells)} cells, {kept} of them finished before; {min(jobs, len(cells))} at a time")
    reasons = run_tasks(tasks, jobs, say)
    failures = [
        Failure(variant=cells[place].variant.name, seed=cells[place].seed, reason=reason)
        for place, reason in sorted(reasons.items())
    ]
    results = [read_result(cell) for place, cell in enumerate(cells) if place not in reasons]
    names = list(reports)
    lease.check()
    _write(grid, compared(names, list(cells[0].config.data.sources), results, failures))
    say(f"written: {grid.output}/comparison.md, comparison.html, comparison.json")
    return failures


def _check(cells: Sequence[Cell]) -> dict[str, list[SourceReport]]:
    """Refuse what would fail, prepare all sources, and return what those of each variant hold."""
    for cell in cells:
        cell.check_run_dir()
        if not cell.config.data.probed:
            raise InputError(
                "no source has held-out rows to compare on; give some, as data.sources.NAME.probe"
            )
        cell.scores()  # which refuses files that cannot be used
    reports: dict[str, list[SourceReport]] = {}
    by_data: dict[str, Data] = {}
    for cell in cells:
        if cell.variant.name in reports:
            continue
        data = json.dumps(to_dict(cell.config)["data"])  # mostly the same for all
        same = [other for other in cells if other.variant.name == cell.variant.name]
        fresh = any(begins(other.run_dir, "auto") for other in same)
        try:
            check_run(cell.config, cell.grid.nproc)
            checked = check_before_start(cell.config, fresh=fresh)
            if cell.asks:
                check_export(cell.config, cell.run_dir)
            by_data[data] = prepare_run(checked, by_data.get(data)).data
        except InputError as error:
            raise InputError(f"variant {cell.variant.name}: {error}") from None
        reports[cell.variant.name] = by_data[data].reports
    return reports


def _task(cell: Cell, reports: Sequence[SourceReport]) -> Task:
    """Return what is left to do of a cell."""
    trained = cell.is_trained(reports)
    left = [] if trained else [cell.train_command()]
    left += [] if trained and cell.is_evaluated() else [cell.evaluate_command()]
    left += [] if cell.is_asked() and (trained or not cell.asks) else [cell.ask_command()]
    return Task(cell, tuple(left))


def _write(grid: Grid, found: Comparison) -> None:
    title = f"Comparison of {grid.run_yaml.stem}"
    page = page_of_comparison(title, grid.output, found)
    write_atomically(grid.output / "comparison.md", markdown(title, page.tables))
    write_atomically(grid.output / "comparison.html", html(page, datetime.now()))
    text = json.dumps(asdict(found), indent=1, allow_nan=False)
    write_atomically(grid.output / "comparison.json", text + "\n")
