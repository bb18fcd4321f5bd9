"""What all charts of a page share: their frame, colours, and which sources stand out.

Axes: N points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_dynmix.report.compare_tables import Table

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
