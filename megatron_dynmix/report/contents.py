"""What a page of one run, and of several, is made of."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dynmix.report.chart import Palette
from megatron_dynmix.report.charts import charts_of
from megatron_dynmix.report.overlay import overlaid
from megatron_dynmix.report.page import Page
from megatron_dynmix.report.run import Run
from megatron_dynmix.report.summary import summary, warnings
from megatron_dynmix.report.tables import (
    end_losses_table,
    end_weights_table,
    events_table,
    runs_table,
    sources_table,
)


def page_of_run(run: Run, now: float) -> Page:
    """A run explained by itself.

    Args:
        run: what was read.
        now: seconds since 1970.

    """
    charts, axes = charts_of(run, Palette.of(run.sources, importance(run)))
    return Page(
        title=f"Run {run.name}",
        paths=[str(run.path)],
        summaries=[("", summary(run, now), warnings(run))],
        charts=charts,
        axes=axes,
        tables=[("sources", sources_table(run))] if run.sources else [],
        last_tables=[("events", events_table(run))] if run.events else [],
        texts=[("Configuration", run.config_text)] if run.config_text else [],
    )


def page_of_runs(runs: Sequence[Run], now: float) -> Page:
    """Runs side by side.

    Args:
        runs: what was read; two or more.
        now: seconds since 1970.

    """
    names = distinct_names(runs)
    charts, axes = overlaid(runs, names)
    return Page(
        title=f"{len(runs)} runs compared",
        paths=[str(run.path) for run in runs],
        summaries=[(name, summary(run, now), warnings(run)) for name, run in zip(names, runs, strict=True)],
        charts=charts,
        axes=axes,
        tables=[
            ("runs", runs_table(runs, names)),
            ("end-weights", end_weights_table(runs, names)),
            ("end-losses", end_losses_table(runs, names)),
        ],
        texts=[
            (f"Configuration of {name}", run.config_text)
            for name, run in zip(names, runs, strict=True)
            if run.config_text
        ],
    )


def importance(run: Run) -> dict[str, float]:
    """Which sources deserve a colour: those with the largest shares at any time, the last counting double."""
    found = dict.fromkeys(run.sources, 0.0)
    for weights in run.weights:
        for name, share in weights.shares.items():
            found[name] = max(found[name], share)
    for name, share in run.weights[-1].shares.items() if run.weights else ():
        found[name] += share
    return found


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names; with as many of the folders above as tell them apart."""
    paths = [run.path.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the same folder twice is refused before")
