"""A comparison to read: its tables, in Markdown and on a page, and its charts.

All are made from the content of `comparison.json`: see `results.summarise`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from megatron_dynmix.report.figures import (
    COLOURS,
    OTHERS,
    Axes,
    Chart,
    Palette,
    drawn,
    figure,
    line,
    name_rows,
    numbers,
    shared_axis,
)
from megatron_dynmix.report.pages import Page
from megatron_dynmix.report.tables import Bold, Table

PANEL_GAP = 44
"""Pixels between two panels of a chart: the upper one's numbers and the lower one's title."""


def page_of_comparison(title: str, output: Path, summary: Mapping[str, Any]) -> Page:
    """Return the page of the comparison in the folder `output`."""
    axes: Axes = {}
    failures = len(summary["failures"])
    return Page(
        title=title,
        paths=[str(output)],
        summaries=[
            (
                "",
                _sentences(summary),
                [f"Cells that failed: {failures}. The last table tells why."] * bool(failures),
            )
        ],
        tables=comparison_tables(summary),
        charts=[_weights(summary, axes), _losses(summary)] if summary["variants"] else [],
        axes=axes,
    )


def markdown(title: str, tables: Mapping[str, Table]) -> str:
    """Return the tables as Markdown, numbers to the right."""
    parts = [f"# {title}", "Charts: [comparison.html](comparison.html)"]
    for table in tables.values():
        lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
        rows = "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)
        parts += [text for text in (f"## {table.title}", table.note, rows) if text]
    return "\n\n".join(parts) + "\n"


def _markdown_cell(cell: str) -> str:
    text = cell.replace("|", "\\|")
    return f"**{text}**" if isinstance(cell, Bold) else text


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    variants = summary["variants"]
    if not variants:
        return ["No cell has finished."]
    seeds = sorted({seed for variant in variants for seed in variant["seeds"]})
    best = min(variants, key=lambda variant: variant["metrics"]["mean_loss"]["mean"])
    return [
        f"Variants with finished cells: {len(variants)}; seeds: {', '.join(map(str, seeds))}.",
        f"The lowest held-out loss in the mean over the sources is that of {best['name']}: "
        f"{best['metrics']['mean_loss']['mean']:.4f} nats per trained token.",
    ]


def comparison_tables(summary: Mapping[str, Any]) -> dict[str, Table]:
    """Return all tables of a comparison by id."""
    tables = {}
    if summary["variants"]:
        tables = {
            "held-out": _losses_table(summary),
            "held-out-sources": _sources_table(summary),
            "final-weights": _weights_table(summary),
        }
    if summary["failures"]:
        rows = [
            [failure["variant"], str(failure["seed"]), failure["reason"]] for failure in summary["failures"]
        ]
        tables["failures"] = Table("Failed cells", ["variant", "seed", "why"], rows)
    return tables


def _losses_table(summary: Mapping[str, Any]) -> Table:
    baseline = summary["baseline"]
    header = ["variant", "seeds", "mean over sources"]
    header += [f"difference to {baseline}"] if baseline else []
    header += ["worst source", "all tokens", "perplexity"]
    rows = []
    for variant in summary["variants"]:
        metrics = variant["metrics"]
        row = [variant["name"], str(len(variant["seeds"])), spread_text(metrics["mean_loss"])]
        row += [difference_text(metrics["mean_loss"]["difference"])] if baseline else []
        row += [spread_text(metrics[name]) for name in ("worst_loss", "token_loss")]
        rows.append([*row, spread_text(metrics["perplexity"], 2)])
    return Table("Held-out loss", header, rows, _note(summary))


def _note(summary: Mapping[str, Any]) -> str:
    """Return what must be known to read the first table."""
    variants = summary["variants"]
    sentences = ["Nats per trained token, mean ± standard deviation over the seeds; lower is better."]
    if summary["baseline"] is None:
        sentences.append("No variant is named uniform, so there is nothing to take differences to.")
    elif any(len(variant["seeds"]) > 1 for variant in variants):
        sentences.append(
            f"Differences are paired by seed, with the {summary['confidence']:.0%} confidence interval in "
            "brackets (Student's t); bold where it leaves out zero."
        )
    if any(len(variant["seeds"]) == 1 for variant in variants):
        sentences.append("One seed has no standard deviation and no interval.")
    without = [
        source
        for source in sorted(summary["sources"])
        if any(f"loss/{source}" not in variant["metrics"] for variant in variants)
    ]
    if without:
        sentences.append(f"Without held-out rows, and in no mean: {', '.join(without)}.")
    return " ".join(sentences)


def _sources_table(summary: Mapping[str, Any]) -> Table:
    sources = summary["sources"]
    rows = [
        [variant["name"], *(spread_text(variant["metrics"].get(f"loss/{source}")) for source in sources)]
        for variant in summary["variants"]
    ]
    return Table("Held-out loss of each source", ["variant", *sources], rows)


def _weights_table(summary: Mapping[str, Any]) -> Table:
    rows = [
        [
            variant["name"],
            *(spread_text(variant["final_weights"][source], 3) for source in summary["sources"]),
            f"{variant['tokens']['mean']:,.0f}",
            f"{variant['seconds']['mean']:.1f}",
        ]
        for variant in summary["variants"]
    ]
    header = ["variant", *summary["sources"], "training tokens", "seconds"]
    note = "Shares of the rows drawn after the last update; seconds of training steps and weight updates."
    return Table("Final weights and cost", header, rows, note)


def spread_text(spread: Mapping[str, Any] | None, digits: int = 4) -> str:
    """Return `mean ± sd`, or the mean alone for a single value."""
    if spread is None:
        return "-"
    text = f"{spread['mean']:.{digits}f}"
    return text if spread["sd"] is None else f"{text} ± {spread['sd']:.{digits}f}"


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """Return `mean [low, high]`, bold where the interval leaves out zero."""
    if difference is None:
        return "-"
    text = f"{difference['mean']:+.4f}"
    if difference["low"] is not None:
        text += f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return Bold(text) if difference["is_clear"] else text


def _weights(summary: Mapping[str, Any], axes: Axes) -> Chart:
    """Draw a panel for each variant: a line for each source and seed."""
    sources, variants = summary["sources"], summary["variants"]
    names = [variant["name"] for variant in variants]
    ends = {
        source: max(variant["final_weights"][source]["mean"] for variant in variants) for source in sources
    }
    palette = Palette.of(sources, ends)
    chart = Chart(
        id="weights",
        title="Weights over iterations",
        reading="A panel for each variant, with a line for each source and seed: the source's share of the "
        "rows drawn from that iteration on.",
        figure=_panels(names, x="iteration", height=130),
    )
    chart.figure.update_yaxes(range=[0, 1], tickformat=".0%")
    others = f"{len(palette.others)} others"
    for cell in summary["cells"]:
        panel, seed = names.index(cell["variant"]) + 1, cell["seed"]
        stages = drawn(cell["weights"])
        axis = shared_axis(axes, f"{cell['variant']}-{seed}", [iteration for iteration, _ in stages])
        for place, source in enumerate(sources):
            colour = palette.colour.get(source, OTHERS)
            weights = [weights[place] for _, weights in stages]
            curve = line(weights, x=axis, name=f"{source}, seed {seed}", colour=colour, shape="hv")
            curve.update(xaxis=f"x{panel}", yaxis=f"y{panel}", line_width=1)
            chart.draw(curve, others if source in palette.others else source, colour)
    return chart


def _losses(summary: Mapping[str, Any]) -> Chart:
    """Draw a panel for each source: points for the seeds of each variant, and their mean."""
    names = [variant["name"] for variant in summary["variants"]]
    cells = summary["cells"]
    sources = [
        source for source in summary["sources"] if any(f"loss/{source}" in cell["metrics"] for cell in cells)
    ]
    chart = Chart(
        id="loss",
        title="Held-out loss of each source by seed",
        reading="A panel for each source, with a point for each seed of a variant and a stroke for the mean.",
        figure=_panels(sources, x="nats per trained token", height=30 + 18 * len(names)),
    )
    chart.figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)
    name_rows(chart.figure, names, names)
    for panel, source in enumerate(sources, start=1):
        losses = {
            name: [
                cell["metrics"][f"loss/{source}"]
                for cell in cells
                if cell["variant"] == name and f"loss/{source}" in cell["metrics"]
            ]
            for name in names
        }
        seeds = [(loss, name) for name, of_seeds in losses.items() for loss in of_seeds]
        means = [(fmean(of_seeds), name) for name, of_seeds in losses.items() if of_seeds]
        stroke = {"symbol": "line-ns", "size": 14, "line": {"color": COLOURS[1], "width": 3}}
        for box, points, colour, marker in (
            ("seeds", seeds, COLOURS[0], {"size": 8}),
            ("mean", means, COLOURS[1], stroke),
        ):
            trace = go.Scatter(
                x=numbers([loss for loss, _ in points]),
                y=[name for _, name in points],
                name=box,
                mode="markers",
                marker={"color": colour, **marker},
                xaxis=f"x{panel}",
                yaxis=f"y{panel}",
            )
            chart.draw(trace, box, colour)
    return chart


def _panels(titles: Sequence[str], *, x: str, height: int) -> go.Figure:
    """Return a figure of panels below one another, each of so many pixels."""
    whole = len(titles) * (height + PANEL_GAP) - PANEL_GAP
    chart = figure(y="", x="", height=whole + 90)
    chart.set_subplots(
        rows=len(titles),
        cols=1,
        subplot_titles=titles,
        vertical_spacing=PANEL_GAP / whole,
    )
    chart.update_layout(margin_t=PANEL_GAP)
    chart.update_annotations(font_size=13)
    chart.update_xaxes(title_text=x, row=len(titles))
    chart.update_yaxes(automargin=True)
    return chart
