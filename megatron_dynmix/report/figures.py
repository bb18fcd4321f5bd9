"""What all charts of a page share: their frame, colors, curves and axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import plotly.graph_objects as go

from megatron_dynmix.report.run import MOST_POINTS, Run, Weights, thinned
from megatron_dynmix.report.tables import Table

COLOURS = (
    *("#3b7fe0", "#d9700f", "#1f9360", "#d9415d", "#9464d6"),
    *("#0f8f9c", "#a9743b", "#cf4fa6", "#7f8a12", "#6b7c93"),
)
"""Each at least 3 to 1 in contrast with the light and the dark page."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
OTHERS = "#8a8f98"
TOP = len(COLOURS)
LONGEST_NAME = 14
Axes = dict[str, list[int]]
"""Iterations by the name that curves give in `meta`: the page holds each axis once."""
Point = TypeVar("Point")


@dataclass(kw_only=True)
class Chart:
    """One figure of a page, and what stands around it."""

    id: str
    title: str
    reading: str
    """How to read it."""
    figure: go.Figure
    said: str = ""
    """What it shows, in words."""
    legend: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """The traces that a box switches, by the box's name and color."""
    table: Table | None = None
    """Its numbers."""
    frames: Mapping[str, Any] | None = None
    """The values of a heat map that has a slider."""
    thinned: str = ""
    """What was left out."""

    def draw(self, trace: Any, name: str, colour: str) -> None:
        """Add a trace, and switch it by the box of this name and color."""
        self.legend.setdefault((name, colour), []).append(len(self.figure.data))
        self.figure.add_trace(trace)


@dataclass(frozen=True)
class Palette:
    """Sources that have a color of their own, and those that do not."""

    shown: tuple[str, ...]
    others: tuple[str, ...]
    colour: Mapping[str, str] = field(default_factory=dict)
    dash: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: Sequence[str], importance: Mapping[str, float]) -> Palette:
        """Choose colors for the most important sources, in the order of the run."""
        chosen = set(sorted(sources, key=lambda name: -importance.get(name, 0.0))[:TOP])
        shown = tuple(name for name in sources if name in chosen)
        return cls(
            shown=shown,
            others=tuple(name for name in sources if name not in chosen),
            colour={name: COLOURS[place] for place, name in enumerate(shown)},
            dash={name: DASHES[place % len(DASHES)] for place, name in enumerate(shown)},
        )


def figure(*, y: str, x: str = "iteration", height: int = 340, **axis: Any) -> go.Figure:
    """Return an empty figure without colors of its own: the page has two themes.

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
    """Return values as a figure keeps them: four bytes each."""
    return np.asarray(values, dtype=np.float32)


def line(values: Sequence[float], *, x: str, name: str, colour: str | None, **more: Any) -> go.Scatter:
    """Return a curve over the page's axis `x`; without a color it has that of the text, in either theme."""
    return go.Scatter(
        y=numbers(values),
        meta=x,
        name=name,
        mode="lines" if len(values) > 1 else "markers",
        line={"color": colour, "width": 2, **more},
    )


def band(values: Sequence[float], *, x: str, name: str, colour: str, **more: Any) -> go.Scatter:
    """Return one layer of a stack over the page's axis `x`."""
    return go.Scatter(
        y=numbers(values),
        meta=x,
        name=name,
        mode="lines",
        stackgroup=x,
        line={"color": colour, "width": 1, **more},
        fillcolor=colour,
    )


def short(name: str) -> str:
    """Return a name that leaves room for the chart, on a telephone too."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def name_rows(chart: go.Figure, values: Sequence[Any], names: Sequence[str]) -> None:
    """Write short names beside values of the vertical axis."""
    chart.update_yaxes(tickmode="array", tickvals=values, ticktext=list(map(short, names)))


def drawn(points: Sequence[Point]) -> list[Point]:
    """Return as many of the points as a screen can tell apart."""
    return [points[place] for place in thinned(len(points), MOST_POINTS)]


def drawn_weights(run: Run) -> list[Weights]:
    """Return the stages of the mix, and the last once more as far as it went."""
    weights = drawn(run.weights)
    if weights and run.iteration > weights[-1].iteration:
        weights.append(replace(weights[-1], iteration=run.iteration))
    return weights


def shared_axis(axes: Axes, name: str, iterations: list[int]) -> str:
    """Return the name of the axis of these iterations; where there is none it is added under `name`."""
    found = next((axis for axis, held in axes.items() if held == iterations), name)
    axes[found] = iterations
    return found
