"""What all charts of a page share: their frame, colours, and which sources stand out.

Axes: N points.

The charts of one run.

Axes: D sources, C columns of a heat map.

The plots of a comparison as SVG: weights over iterations, held-out loss of each source.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure

from megatron_dynmix.records.schema import TrainingRecord
from megatron_dynmix.report.run import MARKED, MOST_POINTS, PHASES, Run, quantised, thinned
from megatron_dynmix.report.tables import Table, course_table, distance_table

COLOURS = (
    *("#3b7fe0", "#d9700f", "#1f9360", "#d9415d", "#9464d6"),
    *("#0f8f9c", "#a9743b", "#cf4fa6", "#7f8a12", "#6b7c93"),
)
"""Each at least 3 to 1 in contrast with the light and the dark page."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
OTHERS = "#8a8f98"
TOP = len(COLOURS)
LONGEST_NAME = 14
LegendEntry = tuple[str, str, tuple[int, ...]]
"""Name, colour, and the traces that it switches."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One figure of a page, and what stands around it."""

    id: str
    title: str
    reading: str
    """How to read it."""
    figure: go.Figure
    said: str = ""
    """What it shows, in words."""
    legend: tuple[LegendEntry, ...] = ()
    table: Table | None = None
    """Its numbers."""
    frames: Mapping[str, Any] | None = None
    """Of a heat map that has a slider."""
    thinned: str = ""
    """What was left out."""


@dataclass(frozen=True)
class Palette:
    """Sources that have a colour of their own, and those that do not."""

    shown: tuple[str, ...]
    others: tuple[str, ...]
    colour: Mapping[str, str] = field(default_factory=dict)
    dash: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: Sequence[str], importance: Mapping[str, float]) -> Palette:
        """Colours for the most important sources, in the order of the run."""
        ranked = sorted(sources, key=lambda name: -importance.get(name, 0.0))
        # a colour that would stand for one other source alone is better given to it
        chosen = set(ranked[:TOP])
        shown = tuple(name for name in sources if name in chosen)
        return cls(
            shown=shown,
            others=tuple(name for name in sources if name not in chosen),
            colour={name: COLOURS[place] for place, name in enumerate(shown)},
            dash={name: DASHES[place % len(DASHES)] for place, name in enumerate(shown)},
        )


def figure(*, y: str, x: str = "iteration", height: int = 340, **axis: Any) -> go.Figure:
    """An empty figure without colours of its own: the page has two themes.

    Args:
        y: title of the vertical axis.
        x: title of the horizontal axis.
        height: in CSS pixels.
        axis: further settings of the vertical axis.

    """
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 58, "r": 14, "t": 14, "b": 46},
            "showlegend": False,
            "hovermode": "closest",
            "xaxis": {"title": {"text": x}, "automargin": True},
            "yaxis": {"title": {"text": y}, "automargin": True, **axis},
        }
    )


def numbers(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """As a figure keeps them: four bytes each."""
    return np.asarray(values, dtype=np.float32)


def line(values: Sequence[float], *, x: str, name: str, colour: str | None, **more: Any) -> go.Scatter:
    """A curve over an axis that the page holds once, under the name `x`.

    Args:
        values: N of them.
        x: name of the axis.
        name: said when it is pointed at.
        colour: of the line; None is the colour of text, in either theme.
        more: settings of the line.

    """
    return go.Scatter(
        y=numbers(values),
        meta=x,
        name=name,
        mode="lines" if len(values) > 1 else "markers",
        line={"color": colour, "width": 2, **more},
    )


def source_lines(
    chart: go.Figure, values: Mapping[str, Sequence[float]], palette: Palette, *, x: str
) -> tuple[LegendEntry, ...]:
    """Draw a curve for each source, those without a colour first and thin; returns the legend."""
    entries: list[LegendEntry] = []
    others = [name for name in palette.others if name in values]
    for name in others:
        chart.add_trace(line(values[name], x=x, name=name, colour=OTHERS, width=0.7))
    for name in palette.shown:
        if name not in values:
            continue
        colour = palette.colour[name]
        entries.append((name, colour, (len(chart.data),)))
        chart.add_trace(line(values[name], x=x, name=name, colour=colour, dash=palette.dash[name]))
    if others:
        entries.append((f"{len(others)} others", OTHERS, tuple(range(len(others)))))
    return tuple(entries)


def short(name: str) -> str:
    """A name that leaves room for the chart, on a telephone too."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def mark(chart: go.Figure, iterations: Sequence[int]) -> None:
    """Dotted upright lines where something happened."""
    for iteration in iterations:
        chart.add_shape(
            type="line",
            x0=iteration,
            x1=iteration,
            y0=0,
            y1=1,
            yref="paper",
            line={"color": OTHERS, "width": 1.5, "dash": "dot"},
        )


MOST_MARKS = 40
MOST_BARS = 20
MOST_NAMES = 24
"""Names of sources beside a heat map; more cannot be read."""
Axes = dict[str, list[int]]


def charts_of(run: Run, palette: Palette) -> tuple[list[Chart], Axes]:
    """All charts that a run has the records for, and the axes that their curves share."""
    weights = [run.weights[place] for place in thinned(len(run.weights), MOST_POINTS)]
    metrics = [run.metrics[place] for place in thinned(len(run.metrics), MOST_POINTS)]
    updates = [run.updates[place] for place in thinned(len(run.updates), MOST_POINTS)]
    axes = {
        "weights": [point.iteration for point in weights],
        "metrics": [record.iteration for record in metrics],
        "updates": [update.iteration for update in updates],
    }
    if weights and run.iteration > weights[-1].iteration:
        weights.append(weights[-1])  # the last stage is drawn as far as it went
        axes["weights"].append(run.iteration)
    found = [
        _weights(run, weights, palette),
        _losses(run, metrics, palette),
        _deltas(run, updates, palette),
        _gate_load(run),
        _distance(run),
        *_tokens(run, palette),
        *_evenness(run, updates),
        _imbalance(run, axes),
        _throughput(run, metrics),
        _cost(run, updates),
    ]
    return [chart for chart in found if chart is not None], axes


def _note(drawn: int, of: int, what: str) -> str:
    return f"{drawn} of {of:,} {what} are drawn, evenly spread." if drawn < of else ""


def _marks(run: Run) -> list[int]:
    return sorted({event.iteration for event in run.events if event.kind in MARKED})[:MOST_MARKS]


def _weights(run: Run, weights: Sequence[Any], palette: Palette) -> Chart | None:
    if not weights:
        return None
    chart = figure(y="share of the rows drawn", range=[0, 1], tickformat=".0%")
    bands = [(name, palette.colour[name], [name]) for name in palette.shown]
    if palette.others:
        bands.append((f"{len(palette.others)} others", OTHERS, list(palette.others)))
    legend: list[LegendEntry] = []
    for name, colour, members in bands:
        shares = [sum(point.shares.get(member, 0.0) for member in members) for point in weights]
        chart.add_trace(
            go.Scatter(
                y=numbers(shares),
                meta="weights",
                name=name,
                mode="lines",
                stackgroup="weights",
                line={"color": colour, "width": 1, "shape": "hv"},
                fillcolor=colour,
                hovertemplate="%{y:.1%}",
            )
        )
        legend.append((name, colour, (len(legend),)))
    mark(chart, _marks(run))
    return Chart(
        id="weights",
        title="Weights over time",
        reading="The height of a band is the source's share of the rows drawn from that iteration on. Dotted "
        "lines are resumes, overrides, faults and changed sources.",
        figure=chart,
        legend=tuple(legend),
        thinned=_note(min(len(run.weights), MOST_POINTS), len(run.weights), "stages of the mix"),
    )


def _losses(run: Run, metrics: Sequence[TrainingRecord], palette: Palette) -> Chart | None:
    if not metrics:
        return None
    by_name = [record.losses for record in metrics]
    names = {name for losses in by_name for name in losses}
    chart = figure(y="loss in nats per trained token")
    legend = source_lines(
        chart,
        {name: [losses.get(name, math.nan) for losses in by_name] for name in names},
        palette,
        x="metrics",
    )
    whole = [record.lm_loss for record in metrics]
    legend += (("all sources", "currentColor", (len(chart.data),)),)
    chart.add_trace(line(whole, x="metrics", name="all sources", colour=None, width=3))
    mark(chart, _marks(run))
    return Chart(
        id="loss",
        title="Training loss of each source",
        reading="Lower is better. A source that was not drawn in an interval has no loss there, and its line "
        "a gap.",
        figure=chart,
        legend=legend,
        thinned=_note(len(metrics), len(run.metrics), "log intervals"),
    )


def _deltas(run: Run, updates: Sequence[Any], palette: Palette) -> Chart | None:
    names = {name for update in updates for name, value in update.delta.items() if math.isfinite(value)}
    if not names:
        return None
    chart = figure(y="delta")
    values = {name: [update.delta.get(name, math.nan) for update in updates] for name in names}
    legend = source_lines(chart, values, palette, x="updates")
    return Chart(
        id="delta",
        title="Delta of each source",
        reading="The strategy's score: weight goes to sources above the others. For gate-load it is the mean "
        "distance of a source's gate load to those of all sources: larger is less redundant.",
        figure=chart,
        legend=legend,
        thinned=_note(len(updates), len(run.updates), "updates"),
    )


def _heat(frames: Mapping[str, Any], *, x: str, height: int, names: list[str] | None) -> go.Figure:
    chart = figure(y="", x=x, height=height, autorange="reversed")
    ticks: dict[str, Any] = {"tickmode": "array", "tickvals": list(range(len(frames["sources"])))}
    ticks["ticktext"] = [short(name) for name in frames["sources"]]
    if len(frames["sources"]) <= MOST_NAMES:
        chart.update_yaxes(**ticks)
    else:
        chart.update_yaxes(title={"text": "source number"})
    if names is not None and len(names) <= MOST_NAMES:
        chart.update_xaxes(**ticks)
    _, rows, columns = frames["shape"]
    gap = 1 if max(rows, columns) <= MOST_NAMES else 0
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
    drawn = len(frames["iterations"])
    note = _note(drawn, len(run.updates), "updates")
    if frames["left_out"]:
        note += f" {frames['left_out']} of other sources or experts than the last are left out."
    note += f" Values are rounded to 1/255 of the largest, {frames['most']:.4g}"
    if frames["coloured_most"] < frames["most"]:
        note += f"; those above {frames['coloured_most']:.4g} have one colour"
    return f"{note}.".strip()


def _gate_load(run: Run) -> Chart | None:
    frames = quantised(run.load_frames)
    if frames is None:
        return None
    height = min(640, 150 + 22 * len(frames["sources"]))
    chart = _heat(frames, x=run.load_axis, height=height, names=None)
    return Chart(
        id="gate-load",
        title="Gate load",
        reading="Share of a source's routed tokens that each expert gets. Two sources with like rows teach "
        "much the same. Move the slider to go through the updates.",
        figure=chart,
        frames=frames,
        thinned=_frames_note(frames, run),
    )


def _distance(run: Run) -> Chart | None:
    frames = quantised(run.distance_frames)
    if frames is None:
        return None
    sources = frames["sources"]
    height = min(640, 190 + 22 * len(sources))
    chart = _heat(frames, x="source", height=height, names=sources)
    table = distance_table(run.distance_frames[-1])
    return Chart(
        id="distance",
        title="Distance between sources",
        reading="How unlike the gate loads of two sources are: 0 is alike. The slider is the same as above.",
        figure=chart,
        frames=frames,
        table=table,
        thinned=_frames_note(frames, run),
    )


def _bars(values: Mapping[str, float], palette: Palette, *, unit: str) -> go.Figure:
    largest = sorted(values, key=lambda name: -values[name])[:MOST_BARS]
    names = [name for name in values if name in largest]
    chart = figure(y="", x=unit, height=110 + 20 * len(names), autorange="reversed")
    chart.update_yaxes(tickmode="array", tickvals=names, ticktext=[short(name) for name in names])
    chart.add_trace(
        go.Bar(
            y=names,
            x=numbers([values[name] for name in names]),
            orientation="h",
            marker={"color": [palette.colour.get(name, OTHERS) for name in names]},
        )
    )
    chart.update_xaxes(rangemode="tozero")
    return chart


def _bars_note(values: Mapping[str, float]) -> str:
    if len(values) <= MOST_BARS:
        return ""
    return f"The {MOST_BARS} largest of {len(values)}; the table of sources has all."


def _tokens(run: Run, palette: Palette) -> list[Chart]:
    charts = []
    tokens = run.metrics[-1].tokens if run.metrics else {}
    if tokens:
        charts.append(
            Chart(
                id="tokens",
                title="Tokens of each source",
                reading="Tokens trained on up to the last log interval, padding not counted.",
                figure=_bars(tokens, palette, unit="tokens"),
                thinned=_bars_note(tokens),
            )
        )
    epochs = run.updates[-1].epochs if run.updates else {}
    if epochs:
        charts.append(
            Chart(
                id="epochs",
                title="Epochs of each source",
                reading="How often a source's rows were drawn up to the last update; above 1 they repeat.",
                figure=_bars(epochs, palette, unit="epochs"),
                thinned=_bars_note(epochs),
            )
        )
    return charts


def _evenness(run: Run, updates: Sequence[Any]) -> list[Chart]:
    curves = [
        (
            *("entropy", "Entropy of the mix", "nats", [update.entropy for update in updates]),
            "Highest, log of the number of sources, where all are drawn alike; 0 where one is drawn alone.",
        ),
        (
            *(
                "kl-step",
                "Size of each step",
                "KL divergence in nats",
                [update.kl_step for update in updates],
            ),
            "How far an update moved the weights. A mix that has settled takes small steps.",
        ),
    ]
    return [
        _curve(key, title, unit, values, reading, x="updates", of=len(run.updates))
        for key, title, unit, values, reading in curves
        if any(map(math.isfinite, values))
    ]


def _curve(
    key: str, title: str, unit: str, values: Sequence[float], reading: str, *, x: str, of: int
) -> Chart:
    chart = figure(y=unit, height=260, rangemode="tozero")
    chart.add_trace(line(values, x=x, name=title.lower(), colour=COLOURS[0]))
    what = "log intervals" if x == "metrics" else "updates"
    return Chart(
        id=key,
        title=title,
        reading=reading,
        figure=chart,
        table=course_table(title, [(unit, values)]),
        thinned=_note(len(values), of, what),
    )


def _imbalance(run: Run, axes: Axes) -> Chart | None:
    points = [update for update in run.updates if update.imbalance]
    points = [points[place] for place in thinned(len(points), MOST_POINTS)]
    if not points:
        return None
    axes["imbalance"] = [point.iteration for point in points]
    curves = {
        "highest of the layers": [max(point.imbalance) for point in points],
        "mean of the layers": [sum(point.imbalance) / len(point.imbalance) for point in points],
    }
    if all(len(point.imbalance) == 1 for point in points):
        curves = {"largest over mean": curves["highest of the layers"]}
    chart = figure(y="largest / mean load", height=260)
    legend = []
    for place, (name, values) in enumerate(curves.items()):
        chart.add_trace(line(values, x="imbalance", name=name, colour=COLOURS[place]))
        legend.append((name, COLOURS[place], (place,)))
    return Chart(
        id="imbalance",
        title="Load of the busiest expert",
        reading="Load of the busiest expert over the mean of all, in the layers that the strategy reads, for "
        "the mix drawn: 1 is even. Large values slow expert-parallel ranks down.",
        figure=chart,
        legend=tuple(legend) if len(legend) > 1 else (),
        table=course_table("Load of the busiest expert", list(curves.items())),
        thinned=_note(len(points), len(run.updates), "updates"),
    )


def _throughput(run: Run, metrics: Sequence[TrainingRecord]) -> Chart | None:
    values = [record.tokens_per_second for record in metrics]
    if not any(map(math.isfinite, values)):
        return None
    reading = "Tokens trained on per second of training steps, padding not counted."
    return _curve(
        "throughput", "Throughput", "tokens per second", values, reading, x="metrics", of=len(run.metrics)
    )


def _cost(run: Run, updates: Sequence[Any]) -> Chart | None:
    if not run.mixing_seconds:
        return None
    chart = figure(y="seconds of an update", height=260, rangemode="tozero")
    legend, courses = [], []
    for place, phase in enumerate(PHASES):
        seconds = [update.seconds.get(phase, math.nan) for update in updates]
        chart.add_trace(
            go.Scatter(
                y=numbers(np.nan_to_num(seconds).tolist()),
                meta="updates",
                name=phase,
                mode="lines",
                stackgroup="cost",
                line={"color": COLOURS[place], "width": 1},
                fillcolor=COLOURS[place],
            )
        )
        legend.append((phase, COLOURS[place], (place,)))
        courses.append((f"{phase} (s)", seconds))
    whole = run.mixing_seconds + run.step_seconds
    said = f"All updates took {run.mixing_seconds:.3g} s"
    if run.step_seconds:
        said += f", {run.mixing_seconds / whole:.1%} of the time of updates and training steps together"
    return Chart(
        id="cost",
        title="Cost of mixing",
        reading="Seconds of each update: measuring the signal, adding it up over the ranks, deciding, and "
        "building the next stage.",
        said=f"{said}.",
        figure=chart,
        legend=tuple(legend),
        table=course_table("Cost of mixing", courses),
        thinned=_note(len(updates), len(run.updates), "updates"),
    )


INK = "#808080"
"""Readable on a light and on a dark page."""
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    **{
        name: INK
        for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    },
}
COLUMNS = 4


def weights_svg(summary: Mapping[str, Any]) -> str:
    """Weights of the sources over iterations: a panel for each variant, a line for each source and seed."""
    sources = summary["sources"]
    names = [variant["name"] for variant in summary["variants"]]
    with mpl.rc_context({**STYLE, "svg.hashsalt": "weights"}):
        figure, panels = _panels(names, height=1.9)
        for name, axes in zip(names, panels, strict=True):
            for cell in summary["cells"]:
                if cell["variant"] != name:
                    continue
                iterations = [iteration for iteration, _ in cell["weights"]]
                for place, source in enumerate(sources):
                    weights = [weights[place] for _, weights in cell["weights"]]
                    axes.step(
                        *([*iterations, max(iterations[-1], 1)], [*weights, weights[-1]]),
                        where="post",
                        color=f"C{place}",
                        linewidth=1,
                        label=source,
                    )
            axes.set_ylim(0, 1)
        handles, labels = panels[0].get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True))
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=8, frameon=False)
        return _svg(figure)


def losses_svg(summary: Mapping[str, Any]) -> str:
    """Held-out losses: a panel for each source, a line of points (seeds, and their mean) for each variant."""
    names = [variant["name"] for variant in summary["variants"]]
    metrics = [f"loss/{source}" for source in summary["sources"]]
    with mpl.rc_context({**STYLE, "svg.hashsalt": "losses"}):
        figure, panels = _panels(summary["sources"], height=0.6 + 0.18 * len(names))
        for metric, axes in zip(metrics, panels, strict=True):
            for place, name in enumerate(names):
                losses = [
                    cell["metrics"][metric]
                    for cell in summary["cells"]
                    if cell["variant"] == name and metric in cell["metrics"]
                ]
                if losses:
                    axes.plot(losses, [place] * len(losses), ".", color="C0", alpha=0.5)
                    axes.plot(sum(losses) / len(losses), place, "|", color="C1", markersize=10)
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
        return _svg(figure)


def _panels(titles: Sequence[str], height: float) -> tuple[Figure, list[Panel]]:
    columns = min(COLUMNS, len(titles))
    lines = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(2.9 * columns, (height + 0.4) * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten().tolist()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, fontsize=9)
        axes.set_facecolor("none")
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    return figure, grid[: len(titles)]


def _svg(figure: Figure) -> str:
    """The figure as an `<svg>` element that a page can hold."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
