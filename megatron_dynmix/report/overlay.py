"""The charts of several runs: their curves over one another, their ends side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import plotly.graph_objects as go

from megatron_dynmix.report.charts import COLOURS, DASHES, Axes, Chart, LegendEntry, figure, line, numbers
from megatron_dynmix.report.run import MOST_POINTS, Run, end_losses, end_weights, thinned

Curve = tuple[list[int], list[float]]
MOST_SOURCES = 8
"""Whose weights are drawn over time: those that the runs disagree on most."""


def overlaid(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[Chart], Axes]:
    """All charts of a comparison, and the axes of their curves.

    Args:
        runs: what was read.
        names: that tell them apart.

    """
    axes: Axes = {}
    charts = [
        _bars("end-weights-chart", "Weights at the end", "share of the rows", runs, names, end_weights),
        _curves(axes, "loss", "Training loss", "nats per trained token", runs, names, _losses),
        _bars("end-losses-chart", "Last loss of each source", "nats per token", runs, names, end_losses),
        *(
            _curves(
                *(axes, f"weight-{place}", f"Weight of {source}", "share of the rows", runs, names),
                partial(_weights, source),
                step=True,
            )
            for place, source in enumerate(_disputed(runs))
        ),
        _curves(axes, "entropy", "Entropy of the mix", "nats", runs, names, _entropy),
        _curves(axes, "throughput", "Throughput", "tokens per second", runs, names, _throughput),
    ]
    return [chart for chart in charts if chart is not None], axes


def _disputed(runs: Sequence[Run]) -> list[str]:
    ends = [end_weights(run) for run in runs if run.weights]
    sources = list(dict.fromkeys(name for end in ends for name in end))

    def spread(name: str) -> float:
        shares = [end.get(name, 0.0) for end in ends]
        return max(shares) - min(shares)

    chosen = sorted(sources, key=lambda name: -spread(name))[:MOST_SOURCES]
    return [name for name in sources if name in chosen]


def _losses(run: Run) -> Curve:
    return _of_metrics(run, "lm_loss")


def _throughput(run: Run) -> Curve:
    return _of_metrics(run, "tokens_per_second")


def _of_metrics(run: Run, key: str) -> Curve:
    points = [run.metrics[place] for place in thinned(len(run.metrics), MOST_POINTS)]
    return [point.iteration for point in points], [getattr(point, key) for point in points]


def _entropy(run: Run) -> Curve:
    points = [run.updates[place] for place in thinned(len(run.updates), MOST_POINTS)]
    return [point.iteration for point in points], [point.entropy for point in points]


def _weights(source: str, run: Run) -> Curve:
    points = [run.weights[place] for place in thinned(len(run.weights), MOST_POINTS)]
    curve = [point.iteration for point in points], [point.shares.get(source, 0.0) for point in points]
    if points and run.iteration > points[-1].iteration:
        curve[0].append(run.iteration)
        curve[1].append(curve[1][-1])
    return curve


def _curves(
    axes: Axes,
    key: str,
    title: str,
    unit: str,
    runs: Sequence[Run],
    names: Sequence[str],
    curve_of: Callable[[Run], Curve],
    *,
    step: bool = False,
) -> Chart | None:
    chart = figure(y=unit, height=280)
    legend: list[LegendEntry] = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        iterations, values = curve_of(run)
        if not any(map(math.isfinite, values)):
            continue
        colour = COLOURS[place % len(COLOURS)]
        axis = next((axis for axis, held in axes.items() if held == iterations), f"{key}-{place}")
        axes[axis] = iterations
        legend.append((name, colour, (len(legend),)))
        shape = {"shape": "hv"} if step else {}
        dash = DASHES[place % len(DASHES)]
        chart.add_trace(line(values, x=axis, name=name, colour=colour, dash=dash, **shape))
    if not legend:
        return None
    return Chart(
        id=key,
        title=title,
        reading="A curve for each run.",
        figure=chart,
        legend=tuple(legend),
        thinned=f"At most {MOST_POINTS} points of a run are drawn, evenly spread.",
    )


def _bars(
    key: str,
    title: str,
    unit: str,
    runs: Sequence[Run],
    names: Sequence[str],
    values_of: Callable[[Run], Mapping[str, float]],
) -> Chart | None:
    found = [values_of(run) for run in runs]
    sources = list(dict.fromkeys(name for values in found for name in values))
    if not sources:
        return None
    height = 110 + (10 + 9 * len(runs)) * len(sources)
    chart = figure(y="", x=unit, height=height, autorange="reversed", dtick=1)
    chart.update_layout(barmode="group")
    legend = []
    for place, (name, values) in enumerate(zip(names, found, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        chart.add_trace(
            go.Bar(
                y=sources,
                x=numbers([values.get(source, math.nan) for source in sources]),
                orientation="h",
                name=name,
                marker={"color": colour},
            )
        )
        legend.append((name, colour, (place,)))
    chart.update_xaxes(rangemode="tozero")
    return Chart(
        id=key,
        title=title,
        reading="A bar for each run; a source that a run does not have has none.",
        figure=chart,
        legend=tuple(legend),
    )
