"""The page and the tables of how alike sources are."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from megatron_dynmix.mixing.strategies.uniqueness import Uniqueness
from megatron_dynmix.report.figures import COLOURS, Chart, figure, name_rows, numbers
from megatron_dynmix.report.pages import Page
from megatron_dynmix.report.tables import Table, text
from megatron_dynmix.similarity.findings import Findings
from megatron_dynmix.similarity.measure import Measurement

MOST_PAIRS = 40


def sentences(found: Findings) -> list[str]:
    """Say what was found."""
    together = [kind for kind in found.kinds if len(kind) > 1]
    if not found.likeness.told_apart:
        said = ["No two sources can be told apart by their gate loads: they count as one kind."]
        return [*said, "Read more tokens (--tokens), or use a model that has learned more."]
    said = [f"{', '.join(kind)} are one kind: they load the experts alike." for kind in together]
    if not together:
        said = [f"All {len(found.sources)} sources are different kinds."]
    best = found.layers[0]
    said.append(
        f"MoE layer {best.layer} tells them apart best: distances are {best.separation:.1f} standard errors."
    )
    return [*said, *(f"{rule}: {why}" for rule, why in found.refusals.items())]


def sources_table(found: Findings, measured: Measurement) -> Table:
    """Return one line for each source."""
    unique_D = found.likeness.unique_D(Uniqueness.alike_from)
    rows = [
        [
            *(name, f"{measured.read_D[d]:,} of {measured.size_D[d]:,}", f"{measured.tokens_D[d]:,}"),
            *(text(measured.losses[d], ".3f"), text(float(unique_D[d]), ".3f")),
            *(text(weights[d], ".4f") for weights in found.weights.values()),
        ]
        for d, name in enumerate(found.sources)
    ]
    header = ["source", "rows read", "tokens", "loss", "unique", *found.weights]
    note = "Unique: the share that a source has for itself, 1 / n for one of n copies. Then the weights that "
    return Table(
        "Sources",
        header,
        rows,
        note + "each rule would begin with, in an even mix. Losses in nats per token.",
    )


def pairs_table(found: Findings) -> Table:
    """Return all pairs, the nearest first."""
    names, likeness = found.sources, found.likeness
    pairs = sorted(
        (float(likeness.distance_DD[one, other]), one, other)
        for other in range(len(names))
        for one in range(other)
    )
    note = (
        ""
        if len(pairs) <= MOST_PAIRS
        else f"The {MOST_PAIRS} nearest of {len(pairs):,}; all are in the JSON."
    )
    rows = [
        [
            f"{names[one]} – {names[other]}",
            *(text(distance, ".5f"), text(float(likeness.error_DD[one, other]), ".5f")),
            text(float(likeness.alike_DD[one, other]), ".3f"),
        ]
        for distance, one, other in pairs[:MOST_PAIRS]
    ]
    return Table("Pairs", ["pair", "distance", "standard error", "likeness"], rows, note)


def layers_table(found: Findings) -> Table:
    """Return the MoE layers, the best first."""
    rows = [
        [
            str(layer.layer),
            text(layer.distance, ".5f"),
            text(layer.separation, ".1f"),
            "yes" if layer.told_apart else "no",
        ]
        for layer in found.layers
    ]
    note = "Distance: root mean square over all pairs. In errors: how many standard errors that is."
    return Table("Layers", ["MoE layer", "distance", "in errors", "told apart"], rows, note)


def page_of_sources(model: Path, found: Findings, measured: Measurement) -> Page:
    """Return the page."""
    return Page(
        title=f"How alike {len(found.sources)} sources are to {model.resolve().name}",
        paths=[str(model)],
        summaries=[("", sentences(found), [])],
        tables={"sources": sources_table(found, measured), "layers": layers_table(found)},
        charts=[_tree(found), _map(found), _layers(found)],
        axes={},
        last_tables={"pairs": pairs_table(found)},
    )


def _tree(found: Findings) -> Chart:
    """Draw the joints from left to right, each source on a line of its own."""
    order = [*found.joints[-1].left, *found.joints[-1].right]
    place: dict[tuple[int, ...], float] = {(d,): float(row) for row, d in enumerate(order)}
    height = dict.fromkeys(place, 0.0)
    chart = figure(x="1 - likeness", y="", height=120 + 24 * len(order), autorange="reversed")
    for joint in found.joints:
        left, right = joint.left, joint.right
        chart.add_trace(
            go.Scatter(
                x=numbers([height[left], joint.height, joint.height, height[right]]),
                y=numbers([place[left], place[left], place[right], place[right]]),
                mode="lines",
                line={"color": COLOURS[0], "width": 2},
                hovertemplate=f"{joint.height:.3f}<extra></extra>",
            )
        )
        both = left + right
        place[both], height[both] = (place[left] + place[right]) / 2, joint.height
    name_rows(chart, list(range(len(order))), [found.sources[d] for d in order])
    return Chart(
        id="tree",
        title="Which sources are alike",
        reading="Sources that are joined far to the left load the experts alike and teach much the same. "
        "Below 0.1 they count as one kind.",
        figure=chart,
    )


def _map(found: Findings) -> Chart:
    names = list(found.sources)
    chart = figure(x="source", y="", height=min(640, 190 + 22 * len(names)), autorange="reversed")
    chart.add_trace(
        go.Heatmap(
            z=found.likeness.distance_DD.astype("float32"),
            colorscale="Cividis",
            colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 10}},
            hovertemplate="%{y}, %{x}: %{z:.5f}<extra></extra>",
        )
    )
    name_rows(chart, list(range(len(names))), names)
    rows = chart.layout.yaxis
    chart.update_xaxes(tickmode=rows.tickmode, tickvals=rows.tickvals, ticktext=rows.ticktext)
    return Chart(
        id="distance",
        title="Distance between sources",
        reading="How unlike the gate loads of two sources are, over all MoE layers, without what noise adds: "
        "0 is alike.",
        figure=chart,
    )


def _layers(found: Findings) -> Chart:
    layers = sorted(found.layers, key=lambda layer: layer.layer)
    chart = figure(x="MoE layer", y="distance in standard errors", rangemode="tozero")
    chart.add_trace(
        go.Bar(
            x=[layer.layer for layer in layers],
            y=numbers([layer.separation for layer in layers]),
            marker={"color": COLOURS[0]},
            hovertemplate="layer %{x}: %{y:.1f}<extra></extra>",
        )
    )
    return Chart(
        id="layers",
        title="Which layers tell sources apart",
        reading="How far apart the sources are in each layer, in standard errors of the distances.",
        figure=chart,
    )
