"""The charts of several runs: their curves over one another, their ends side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from megatron_dynmix.report.figures import (
    COLOURS,
    DASHES,
    Axes,
    Chart,
    drawn,
    drawn_weights,
    figure,
    line,
    numbers,
    shared_axis,
)
from megatron_dynmix.report.run import MOST_POINTS, Run, end_losses, end_weights

Curve = tuple[list[int], list[float]]
"""Iterations and values."""
MOST_SOURCES = 8
"""Whose weights are drawn over time: those that the runs disagree on most."""


def overlaid(runs: Mapping[str, Run]) -> tuple[list[Chart], Axes]:
    """Return all charts of runs by name, and the axes that their curves share."""
    axes: Axes = {}
    ends = {name: end_weights(run) for name, run in runs.items()}
    losses = {name: end_losses(run) for name, run in runs.items()}
    found = [
        _bars("end-weights-chart", "Weights at the end", "share of the rows", ends),
        _curves(axes, "loss", "Training loss", "nats per trained token", _of_metrics(runs, "lm_loss")),
        _bars("end-losses-chart", "Last loss of each source", "nats per token", losses),
        *(
            _curves(
                *(axes, f"weight-{place}", f"Weight of {source}", "share of the rows"),
                {name: _weights(run, source) for name, run in runs.items()},
                shape="hv",
            )
            for place, source in enumerate(_disputed([end for end in ends.values() if end]))
        ),
        _curves(
            *(axes, "entropy", "Entropy of the mix", "nats"),
            {name: _entropy(run) for name, run in runs.items()},
        ),
        _curves(
            axes, "throughput", "Throughput", "tokens per second", _of_metrics(runs, "tokens_per_second")
        ),
    ]
    return [chart for chart in found if chart is not None], axes


def _disputed(ends: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the sources whose last weights lie farthest apart."""
    sources = dict.fromkeys(source for end in ends for source in end)
    shares = {source: [end.get(source, 0.0) for end in ends] for source in sources}
    chosen = sorted(shares, key=lambda source: min(shares[source]) - max(shares[source]))[:MOST_SOURCES]
    return [source for source in shares if source in chosen]


def _of_metrics(runs: Mapping[str, Run], key: str) -> dict[str, Curve]:
    points = {name: drawn(run.metrics) for name, run in runs.items()}
    return {
        name: ([record.iteration for record in records], [getattr(record, key) for record in records])
        for name, records in points.items()
    }


def _entropy(run: Run) -> Curve:
    updates = drawn(run.updates)
    return [update.iteration for update in updates], [update.entropy for update in updates]


def _weights(run: Run, source: str) -> Curve:
    weights = drawn_weights(run)
    return [point.iteration for point in weights], [point.shares.get(source, 0.0) for point in weights]


def _curves(
    axes: Axes, chart_id: str, title: str, unit: str, curves: Mapping[str, Curve], **more: str
) -> Chart | None:
    chart = Chart(
        id=chart_id,
        title=title,
        reading="A curve for each run.",
        figure=figure(y=unit, height=280),
        thinned=f"At most {MOST_POINTS} points of a run are drawn, evenly spread.",
    )
    for place, (name, (iterations, values)) in enumerate(curves.items()):
        if not any(map(math.isfinite, values)):
            continue
        colour, dash = COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)]
        axis = shared_axis(axes, f"{chart_id}-{place}", iterations)
        chart.draw(line(values, x=axis, name=name, colour=colour, dash=dash, **more), name, colour)
    return chart if chart.legend else None


def _bars(chart_id: str, title: str, unit: str, ends: Mapping[str, Mapping[str, float]]) -> Chart | None:
    sources = list(dict.fromkeys(source for values in ends.values() for source in values))
    if not sources:
        return None
    height = 110 + (10 + 9 * len(ends)) * len(sources)
    chart = Chart(
        id=chart_id,
        title=title,
        reading="A bar for each run; a source that a run does not have has none.",
        figure=figure(y="", x=unit, height=height, autorange="reversed", dtick=1),
    )
    chart.figure.update_layout(barmode="group", xaxis_rangemode="tozero")
    for place, (name, values) in enumerate(ends.items()):
        colour = COLOURS[place % len(COLOURS)]
        lengths = numbers([values.get(source, math.nan) for source in sources])
        bars = go.Bar(y=sources, x=lengths, orientation="h", name=name, marker={"color": colour})
        chart.draw(bars, name, colour)
    return chart
