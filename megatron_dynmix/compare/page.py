"""A comparison to read: its tables, in Markdown and on a page, and its charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import plotly.graph_objects as go

from megatron_dynmix.compare.results import MEANS, TASK, Comparison, Difference, Spread
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
from megatron_dynmix.report.tables import MOTION, Bold, Table

PANEL_GAP = 44
"""Pixels between two panels of a chart: the upper one's numbers and the lower one's title."""


def page_of_comparison(title: str, output: Path, found: Comparison) -> Page:
    """Return the page of the comparison in the folder `output`."""
    axes: Axes = {}
    failed = len(found.failures)
    return Page(
        title=title,
        paths=[str(output)],
        summaries=[
            (
                "",
                _sentences(found),
                [f"Cells that failed: {failed}. The last table tells why."] if failed else [],
            )
        ],
        tables=comparison_tables(found),
        charts=[_weights(found, axes), _losses(found)] if found.variants else [],
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


def _sentences(found: Comparison) -> list[str]:
    if not found.variants:
        return ["No cell has finished."]
    seeds = sorted({seed for variant in found.variants for seed in variant.seeds})
    best = min(found.variants, key=lambda variant: variant.metrics["mean_loss"].mean)
    return [
        f"Variants with finished cells: {len(found.variants)}; seeds: {', '.join(map(str, seeds))}.",
        f"The lowest held-out loss in the mean over the sources is that of {best.name}: "
        f"{best.metrics['mean_loss'].mean:.4f} nats per trained token.",
    ]


def comparison_tables(found: Comparison) -> dict[str, Table]:
    """Return all tables of a comparison by id."""
    tables = {}
    if found.variants:
        tables = {
            "held-out": _losses_table(found),
            "held-out-sources": Table(
                "Held-out loss of each source",
                ["variant", *found.sources],
                [
                    [
                        variant.name,
                        *(spread_text(variant.metrics.get(f"loss/{name}")) for name in found.sources),
                    ]
                    for variant in found.variants
                ],
            ),
            **_task_tables(found),
            "final-weights": Table(
                "Final weights and cost",
                ["variant", *found.sources, "training tokens", "seconds"],
                [
                    [
                        variant.name,
                        *(spread_text(variant.final_weights[name], 3) for name in found.sources),
                        *(f"{variant.tokens.mean:,.0f}", f"{variant.seconds.mean:.1f}"),
                    ]
                    for variant in found.variants
                ],
                "Shares of the rows drawn after the last update; seconds of steps and of weight updates.",
            ),
            "motion": Table(
                "How the weights moved",
                ["variant", "settled at", "turns", "path", "net"],
                [
                    [
                        variant.name,
                        *(spread_text(variant.motion[name], 1) for name in ("settled", "turns")),
                        *(spread_text(variant.motion[name], 3) for name in ("path", "net")),
                    ]
                    for variant in found.variants
                ],
                MOTION,
            ),
        }
    if found.failures:
        rows = [[failure.variant, str(failure.seed), failure.reason] for failure in found.failures]
        tables["failures"] = Table("Failed cells", ["variant", "seed", "why"], rows)
    return tables


def _task_tables(found: Comparison) -> dict[str, Table]:
    """Return the scores, and their differences to the baseline; nothing where no task was asked."""
    columns = list(
        dict.fromkeys(name for variant in found.variants for name in variant.metrics if name.startswith(TASK))
    )
    if not columns:
        return {}
    header = ["variant", *(name.removeprefix(TASK) for name in columns)]
    scores = [
        [variant.name, *(spread_text(variant.metrics.get(name), 2) for name in columns)]
        for variant in found.variants
    ]
    note = "Percent, or as imported; mean ± standard deviation over the seeds; higher is better."
    tables = {"tasks": Table("Tasks", header, scores, note)}
    if found.baseline:
        differences = [
            [
                variant.name,
                *(
                    difference_text(variant.metrics[name].difference if name in variant.metrics else None, 2)
                    for name in columns
                ),
            ]
            for variant in found.variants
            if variant.name != found.baseline
        ]
        title = f"Tasks, difference to {found.baseline}"
        tables["task-differences"] = Table(title, header, differences, _paired(found))
    return tables


def _paired(found: Comparison) -> str:
    """Say how to read differences."""
    return (
        f"Differences are paired by seed, with the {found.confidence:.0%} confidence interval in brackets "
        "(Student's t); bold where it leaves out zero."
    )


def _losses_table(found: Comparison) -> Table:
    header = ["variant", "seeds", "mean over sources", "worst source", "all tokens", "perplexity"]
    rows = []
    for variant in found.variants:
        losses = [spread_text(variant.metrics[name], 2 if name == "perplexity" else 4) for name in MEANS]
        rows.append([variant.name, str(len(variant.seeds)), *losses])
    if found.baseline:
        header.insert(3, f"difference to {found.baseline}")
        for row, variant in zip(rows, found.variants, strict=True):
            row.insert(3, difference_text(variant.metrics["mean_loss"].difference))
    return Table("Held-out loss", header, rows, _note(found))


def _note(found: Comparison) -> str:
    """Return what must be known to read the first table."""
    counts = {len(variant.seeds) for variant in found.variants}
    sentences = ["Nats per trained token, mean ± standard deviation over the seeds; lower is better."]
    if found.baseline is None:
        sentences.append("No variant is named uniform, so there is nothing to take differences to.")
    elif max(counts) > 1:
        sentences.append(_paired(found))
    if 1 in counts:
        sentences.append("One seed has no standard deviation and no interval.")
    without = [
        source
        for source in sorted(found.sources)
        if any(f"loss/{source}" not in variant.metrics for variant in found.variants)
    ]
    if without:
        sentences.append(f"Without held-out rows, and in no mean: {', '.join(without)}.")
    return " ".join(sentences)


def spread_text(spread: Spread | None, digits: int = 4) -> str:
    """Return `mean ± sd`, or the mean alone for a single value."""
    if spread is None:
        return "-"
    text = f"{spread.mean:.{digits}f}"
    return text if spread.sd is None else f"{text} ± {spread.sd:.{digits}f}"


def difference_text(difference: Difference | None, digits: int = 4) -> str:
    """Return `mean [low, high]`, bold where the interval leaves out zero."""
    if difference is None:
        return "-"
    text = f"{difference.mean:+.{digits}f}"
    if difference.low is not None:
        text += f" [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    return Bold(text) if difference.is_clear else text


def _weights(found: Comparison, axes: Axes) -> Chart:
    """Draw a panel for each variant: a line for each source and seed."""
    names = [variant.name for variant in found.variants]
    ends = {
        name: max(variant.final_weights[name].mean for variant in found.variants) for name in found.sources
    }
    palette = Palette.of(found.sources, ends)
    chart = Chart(
        id="weights",
        title="Weights over iterations",
        reading="A panel for each variant, with a line for each source and seed: the source's share of the "
        "rows drawn from that iteration on.",
        figure=_panels(names, x="iteration", height=130),
    )
    chart.figure.update_yaxes(range=[0, 1], tickformat=".0%")
    others = f"{len(palette.others)} others"
    for cell in found.cells:
        panel = names.index(cell.variant) + 1
        stages = drawn(cell.weights)
        axis = shared_axis(axes, f"{cell.variant}-{cell.seed}", [iteration for iteration, _ in stages])
        for place, source in enumerate(found.sources):
            colour = palette.colour.get(source, OTHERS)
            weights = [weights[place] for _, weights in stages]
            curve = line(weights, x=axis, name=f"{source}, seed {cell.seed}", colour=colour, shape="hv")
            curve.update(xaxis=f"x{panel}", yaxis=f"y{panel}", line_width=1)
            chart.draw(curve, others if source in palette.others else source, colour)
    return chart


def _losses(found: Comparison) -> Chart:
    """Draw a panel for each source: points for the seeds of each variant, and their mean."""
    names = [variant.name for variant in found.variants]
    losses = {
        source: {
            name: [cell.metrics[key] for cell in found.cells if cell.variant == name and key in cell.metrics]
            for name in names
        }
        for source in found.sources
        for key in [f"loss/{source}"]
    }
    measured = [source for source in found.sources if any(losses[source].values())]
    chart = Chart(
        id="loss",
        title="Held-out loss of each source by seed",
        reading="A panel for each source, with a point for each seed of a variant and a stroke for the mean.",
        figure=_panels(measured, x="nats per trained token", height=30 + 18 * len(names)),
    )
    chart.figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)
    name_rows(chart.figure, names, names)
    stroke = {"symbol": "line-ns", "size": 14, "line": {"color": COLOURS[1], "width": 3}}
    for panel, source in enumerate(measured, start=1):
        seeds = [(name, loss) for name, of_seeds in losses[source].items() for loss in of_seeds]
        means = [(name, fmean(of_seeds)) for name, of_seeds in losses[source].items() if of_seeds]
        for box, points, colour, marker in (
            ("seeds", seeds, COLOURS[0], {"size": 8}),
            ("mean", means, COLOURS[1], stroke),
        ):
            trace = go.Scatter(
                x=numbers([loss for _, loss in points]),
                y=[name for name, _ in points],
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
    chart.set_subplots(rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=PANEL_GAP / whole)
    chart.update_layout(margin_t=PANEL_GAP)
    chart.update_annotations(font_size=13)
    chart.update_xaxes(title_text=x, row=len(titles))
    chart.update_yaxes(automargin=True)
    return chart
