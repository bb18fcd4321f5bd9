"""The charts of one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_dynmix.records.schema import TrainingRecord
from megatron_dynmix.report.figures import (
    COLOURS,
    OTHERS,
    Axes,
    Chart,
    Palette,
    band,
    drawn,
    drawn_weights,
    figure,
    line,
    name_rows,
    numbers,
)
from megatron_dynmix.report.run import MARKED, MOST_POINTS, PHASES, Run, Update, Weights, quantised
from megatron_dynmix.report.tables import course_table, distance_table

MOST_MARKS = 40
MOST_BARS = 20
MOST_NAMES = 24
"""Names of sources beside a heat map; more cannot be read."""


def charts_of(run: Run, palette: Palette) -> tuple[list[Chart], Axes]:
    """Return all charts that a run has the records for, and the axes that their curves share."""
    weights, metrics, updates = drawn_weights(run), drawn(run.metrics), drawn(run.updates)
    measured = drawn([update for update in run.updates if update.use])
    found = [
        _weights(run, weights, palette),
        _losses(run, metrics, palette),
        _deltas(run, updates, palette),
        _gate_load(run),
        _distance(run),
        *_totals(run, palette),
        _entropy(run, updates),
        _kl_step(run, updates),
        *_expert_use(run, measured),
        _throughput(run, metrics),
        _cost(run, updates),
    ]
    axes = {
        "weights": [point.iteration for point in weights],
        "metrics": [record.iteration for record in metrics],
        "updates": [update.iteration for update in updates],
        "use": [update.iteration for update in measured],
    }
    return [chart for chart in found if chart is not None], axes


def _note(count: int, total: int, what: str) -> str:
    return f"{count} of {total:,} {what} are drawn, evenly spread." if count < total else ""


def _source_lines(chart: Chart, points: Sequence[Mapping[str, float]], palette: Palette, *, x: str) -> None:
    """Draw a curve for each source that has a value, those without a color first and thin."""
    names = {name for point in points for name, value in point.items() if math.isfinite(value)}
    values = {name: [point.get(name, math.nan) for point in points] for name in names}
    others = [name for name in palette.others if name in names]
    for name in others:
        chart.figure.add_trace(line(values[name], x=x, name=name, colour=OTHERS, width=0.7))
    for name in palette.shown:
        if name in names:
            colour = palette.colour[name]
            curve = line(values[name], x=x, name=name, colour=colour, dash=palette.dash[name])
            chart.draw(curve, name, colour)
    if others:
        chart.legend[f"{len(others)} others", OTHERS] = list(range(len(others)))


def _mark(chart: Chart, run: Run) -> None:
    """Draw dotted upright lines where something happened."""
    iterations = sorted({event.iteration for event in run.events if event.kind in MARKED})
    for iteration in iterations[:MOST_MARKS]:
        dots = {"color": OTHERS, "width": 1.5, "dash": "dot"}
        chart.figure.add_shape(type="line", x0=iteration, x1=iteration, y0=0, y1=1, yref="paper", line=dots)


def _weights(run: Run, weights: Sequence[Weights], palette: Palette) -> Chart | None:
    if not weights:
        return None
    chart = Chart(
        id="weights",
        title="Weights over time",
        reading="The height of a band is the source's share of the rows drawn from that iteration on. Dotted "
        "lines are resumes, overrides, faults and changed sources.",
        figure=figure(y="share of the rows drawn", range=[0, 1], tickformat=".0%"),
        thinned=_note(min(len(run.weights), MOST_POINTS), len(run.weights), "stages of the mix"),
    )
    stack_weights(chart, [point.shares for point in weights], palette, x="weights")
    _mark(chart, run)
    return chart


def stack_weights(chart: Chart, shares: Sequence[Mapping[str, float]], palette: Palette, *, x: str) -> None:
    """Draw the shares of the sources as bands, those without a color as one."""
    bands = [(name, palette.colour[name], [name]) for name in palette.shown]
    if palette.others:
        bands.append((f"{len(palette.others)} others", OTHERS, list(palette.others)))
    for name, colour, members in bands:
        summed = [sum(point.get(member, 0.0) for member in members) for point in shares]
        layer = band(summed, x=x, name=name, colour=colour, shape="hv")
        chart.draw(layer.update(hovertemplate="%{y:.1%}"), name, colour)


def _losses(run: Run, metrics: Sequence[TrainingRecord], palette: Palette) -> Chart | None:
    if not metrics:
        return None
    chart = Chart(
        id="loss",
        title="Training loss of each source",
        reading="Lower is better. A source that was not drawn in an interval has no loss there, and its line "
        "a gap.",
        figure=figure(y="loss in nats per trained token"),
        thinned=_note(len(metrics), len(run.metrics), "log intervals"),
    )
    _source_lines(chart, [record.losses for record in metrics], palette, x="metrics")
    name, means = "all sources", [record.lm_loss for record in metrics]
    chart.draw(line(means, x="metrics", name=name, colour=None, width=3), name, "currentColor")
    _mark(chart, run)
    return chart


def _deltas(run: Run, updates: Sequence[Update], palette: Palette) -> Chart | None:
    chart = Chart(
        id="delta",
        title="Delta of each source",
        reading="The strategy's score: weight goes to sources above the others. For gate-load it is the mean "
        "distance of a source's gate load to those of all sources: larger is less redundant.",
        figure=figure(y="delta"),
        thinned=_note(len(updates), len(run.updates), "updates"),
    )
    _source_lines(chart, [update.delta for update in updates], palette, x="updates")
    return chart if chart.legend else None


def _heat_map(frames: Mapping[str, Any], *, x: str, height: int) -> go.Figure:
    """Return a heat map that the page fills with the frame its slider is at."""
    names = frames["sources"]
    chart = figure(y="", x=x, height=min(640, height + 22 * len(names)), autorange="reversed")
    if len(names) <= MOST_NAMES:
        name_rows(chart, list(range(len(names))), names)
    else:
        chart.update_yaxes(title={"text": "source number"})
    gap = 1 if max(frames["shape"][1:]) <= MOST_NAMES else 0
    chart.add_trace(
        go.Heatmap(
            zmin=0,
            zmax=frames["coloured_most"],
            colorscale="Cividis",
            xgap=gap,
            ygap=gap,
            colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 10}},
            hovertemplate="%{y}, %{x}: %{z:.4f}<extra></extra>",
        )
    )
    return chart


def _frames_note(frames: Mapping[str, Any], run: Run) -> str:
    note = _note(len(frames["iterations"]), len(run.updates), "updates")
    if frames["left_out"]:
        note += f" {frames['left_out']} of other sources or experts than the last are left out."
    note += f" Values are rounded to 1/255 of the largest, {frames['most']:.4g}"
    if frames["coloured_most"] < frames["most"]:
        note += f"; those above {frames['coloured_most']:.4g} have one color"
    return f"{note}.".strip()


def _gate_load(run: Run) -> Chart | None:
    frames = quantised(run.load_frames)
    if frames is None:
        return None
    return Chart(
        id="gate-load",
        title="Gate load",
        reading="Share of a source's routed tokens that each expert gets. Two sources with like rows teach "
        "much the same. Move the slider to go through the updates.",
        figure=_heat_map(frames, x=run.load_axis, height=150),
        frames=frames,
        thinned=_frames_note(frames, run),
    )


def _distance(run: Run) -> Chart | None:
    frames = quantised(run.distance_frames)
    if frames is None:
        return None
    chart = Chart(
        id="distance",
        title="Distance between sources",
        reading="How unlike the gate loads of two sources are: 0 is alike. The slider is the same as above.",
        figure=_heat_map(frames, x="source", height=190),
        frames=frames,
        table=distance_table(run.distance_frames[-1]),
        thinned=_frames_note(frames, run),
    )
    rows = chart.figure.layout.yaxis
    chart.figure.update_xaxes(tickmode=rows.tickmode, tickvals=rows.tickvals, ticktext=rows.ticktext)
    return chart


def _totals(run: Run, palette: Palette) -> list[Chart]:
    """Return bars of what each source has given so far."""
    totals = [
        (
            "tokens",
            run.metrics[-1].tokens if run.metrics else {},
            "Tokens trained on up to the last log interval, padding not counted.",
        ),
        (
            "epochs",
            run.updates[-1].epochs if run.updates else {},
            "How often a source's rows were drawn up to the last update; above 1 they repeat.",
        ),
    ]
    charts = []
    for unit, values, reading in totals:
        largest = sorted(values, key=lambda name: -values[name])[:MOST_BARS]
        names = [name for name in values if name in largest]
        if not names:
            continue
        chart = figure(y="", x=unit, height=110 + 20 * len(names), autorange="reversed")
        name_rows(chart, names, names)
        chart.update_xaxes(rangemode="tozero")
        colours = [palette.colour.get(name, OTHERS) for name in names]
        lengths = numbers([values[name] for name in names])
        chart.add_trace(go.Bar(y=names, x=lengths, orientation="h", marker={"color": colours}))
        left_out = f"The {MOST_BARS} largest of {len(values)}; the table of sources has all."
        thinned = left_out if len(values) > MOST_BARS else ""
        title = f"{unit.capitalize()} of each source"
        charts.append(Chart(id=unit, title=title, reading=reading, figure=chart, thinned=thinned))
    return charts


def _entropy(run: Run, updates: Sequence[Update]) -> Chart | None:
    return _course(
        Chart(
            id="entropy",
            title="Entropy of the mix",
            reading="Highest, log of the number of sources, where all are drawn alike; 0 where one is drawn "
            "alone.",
            figure=figure(y="nats", height=260, rangemode="tozero"),
            thinned=_note(len(updates), len(run.updates), "updates"),
        ),
        {"nats": [update.entropy for update in updates]},
        x="updates",
    )


def _kl_step(run: Run, updates: Sequence[Update]) -> Chart | None:
    unit = "KL divergence in nats"
    return _course(
        Chart(
            id="kl-step",
            title="Size of each step",
            reading="How far an update moved the weights. A mix that has settled takes small steps.",
            figure=figure(y=unit, height=260, rangemode="tozero"),
            thinned=_note(len(updates), len(run.updates), "updates"),
        ),
        {unit: [update.kl_step for update in updates]},
        x="updates",
    )


def _expert_use(run: Run, updates: Sequence[Update]) -> list[Chart | None]:
    """Return what is known of the use of the experts, by MoE layer, for the mix drawn."""
    use = [update.use for update in updates if update.use is not None]
    note = _note(len(updates), len(run.updates), "updates")
    busiest = Chart(
        id="imbalance",
        title="Load of the busiest expert",
        reading="Load of the busiest expert over the mean of all, in the mix drawn: 1 is even. Large values "
        "slow expert-parallel ranks down, if the experts are those of MLPs.",
        figure=figure(y="largest / mean load", height=260),
        thinned=note,
    )
    uneven = Chart(
        id="load-cv-squared",
        title="Unevenness of the experts' loads",
        reading="Squared coefficient of variation of the experts' loads in the mix drawn: 0 is even.",
        figure=figure(y="CV squared", height=260, rangemode="tozero"),
        thinned=note,
    )
    special = Chart(
        id="specialization",
        title="Specialization of the experts",
        reading="Mean distance between the gate loads of any two sources, 0 if all use the experts alike.",
        figure=figure(y="l2 distance", height=260, rangemode="tozero"),
        thinned=note,
    )
    return [
        _over_layers(busiest, [each.busiest for each in use]),
        _over_layers(uneven, [each.cv_squared for each in use]),
        _over_layers(special, [each.specialization or [math.nan] for each in use]),
    ]


def _over_layers(chart: Chart, by_layer: Sequence[Sequence[float]]) -> Chart | None:
    curves = {"highest of the layers": [max(values) for values in by_layer]}
    if any(len(values) > 1 for values in by_layer):
        curves["mean of the layers"] = [sum(values) / len(values) for values in by_layer]
    return _course(chart, curves, x="use")


def _throughput(run: Run, metrics: Sequence[TrainingRecord]) -> Chart | None:
    unit = "tokens per second"
    return _course(
        Chart(
            id="throughput",
            title="Throughput",
            reading="Tokens trained on per second of training steps, padding not counted.",
            figure=figure(y=unit, height=260, rangemode="tozero"),
            thinned=_note(len(metrics), len(run.metrics), "log intervals"),
        ),
        {unit: [record.tokens_per_second for record in metrics]},
        x="metrics",
    )


def _course(chart: Chart, curves: Mapping[str, Sequence[float]], *, x: str) -> Chart | None:
    """Draw a few curves with a table of their course; None where nothing was measured."""
    if not any(math.isfinite(value) for values in curves.values() for value in values):
        return None
    for colour, (name, values) in zip(COLOURS, curves.items(), strict=False):
        chart.draw(line(values, x=x, name=name, colour=colour), name, colour)
    if len(curves) == 1:
        chart.legend = {}
    chart.table = course_table(chart.title, curves)
    return chart


def _cost(run: Run, updates: Sequence[Update]) -> Chart | None:
    if not run.mixing_seconds:
        return None
    said = f"All updates took {run.mixing_seconds:.3g} s"
    if run.step_seconds:
        share = run.mixing_seconds / (run.mixing_seconds + run.step_seconds)
        said += f", {share:.1%} of the time of updates and training steps together"
    seconds = {phase: [update.seconds.get(phase, math.nan) for update in updates] for phase in PHASES}
    chart = Chart(
        id="cost",
        title="Cost of mixing",
        reading="Seconds of each update: measuring the signal, adding it up over the ranks, deciding, and "
        "building the next stage.",
        said=f"{said}.",
        figure=figure(y="seconds of an update", height=260, rangemode="tozero"),
        table=course_table("Cost of mixing", {f"{phase} (s)": values for phase, values in seconds.items()}),
        thinned=_note(len(updates), len(run.updates), "updates"),
    )
    for colour, (phase, values) in zip(COLOURS, seconds.items(), strict=False):
        layer = band(np.nan_to_num(values).tolist(), x="updates", name=phase, colour=colour)
        chart.draw(layer, phase, colour)
    return chart
