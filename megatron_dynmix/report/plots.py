"""The plots of a comparison as SVG: weights over iterations, held-out loss of each source."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def _panels(titles: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
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
