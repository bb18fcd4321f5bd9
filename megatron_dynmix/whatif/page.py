"""The page and the tables of what other rules would have done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dynmix.mixing.trajectory import exchanged
from megatron_dynmix.report.charts import stack_weights
from megatron_dynmix.report.figures import COLOURS, Axes, Chart, Palette, drawn, figure, line
from megatron_dynmix.report.pages import Page
from megatron_dynmix.report.tables import MOTION, Table, text
from megatron_dynmix.whatif.rules import Tried

READ = (
    "What was measured is what the run measured: under other weights the model, its losses and its loads "
    "would have been others. Read it as how each rule judges these signals, not as a run of it."
)
RULES_HEADER = ("rule", "strategy", "settled at", "turns", "path", "net", "from the run", "guarded")


def rules_rows(tried: Sequence[Tried]) -> list[list[str]]:
    """Return one line for each rule, the run's own first."""
    rows = []
    for rule in tried:
        moved = rule.motion
        rows.append(
            [
                *(rule.name, rule.strategy, str(moved.settled), str(moved.turns)),
                *(text(moved.path, ".3f"), text(moved.net, ".3f")),
                *(text(_from_run(rule, tried[0])[-1], ".3f"), str(rule.guarded)),
            ]
        )
    return rows


def weights_rows(tried: Sequence[Tried]) -> list[list[str]]:
    """Return the last weight of each source under each rule."""
    return [
        [name, *(text(rule.points[-1].shares[name], ".4f") for rule in tried)]
        for name in tried[0].points[-1].shares
    ]


def remarks_lines(tried: Sequence[Tried]) -> list[str]:
    """Return what rules had to say, each kind of thing once: in the last words, and how many times."""
    return [
        f"{rule.name}: {text} (the last of {times} such remarks)" if times > 1 else f"{rule.name}: {text}"
        for rule in tried
        for text, times in rule.remarks.values()
    ]


def page_of_rules(run_dir: Path, tried: Sequence[Tried], said: str) -> Page:
    """Return a page with the rules side by side; `said` tells whether the run's own could be asked again."""
    axes: Axes = {"weights": [point.iteration for point in drawn(tried[0].points)]}
    importance: dict[str, float] = {}
    for rule in tried:
        for point in rule.points:
            for name, share in point.shares.items():
                importance[name] = max(importance.get(name, 0.0), share)
    palette = Palette.of(list(importance), importance)
    rules = Table(
        "Rules",
        RULES_HEADER,
        rules_rows(tried),
        f"{MOTION} From the run: between the last weights and the run's. Guarded: updates at which a "
        "guardrail or the operator acted.",
    )
    weights = Table("Last weights", ["source", *(rule.name for rule in tried)], weights_rows(tried))
    return Page(
        title=f"What other rules would have done in {run_dir.resolve().name}",
        paths=[str(run_dir)],
        summaries=[("", [READ, said, *remarks_lines(tried)], [])],
        tables={"rules": rules, "last-weights": weights},
        charts=[_distances(tried), *(_weights(place, rule, palette) for place, rule in enumerate(tried))],
        axes=axes,
    )


def _weights(place: int, rule: Tried, palette: Palette) -> Chart:
    chart = Chart(
        id=f"weights-{place}",
        title=f"Weights: {rule.name}",
        reading="The height of a band is the source's share of the rows drawn from that iteration on.",
        figure=figure(y="share of the rows drawn", range=[0, 1], tickformat=".0%"),
    )
    stack_weights(chart, [point.shares for point in drawn(rule.points)], palette, x="weights")
    return chart


def _distances(tried: Sequence[Tried]) -> Chart:
    chart = Chart(
        id="from-the-run",
        title="How far each rule is from the run",
        reading="The share of the mix that is exchanged between the rule's weights and the run's.",
        figure=figure(y="share exchanged", rangemode="tozero", tickformat=".0%"),
    )
    for place, rule in enumerate(tried[1:]):
        colour = COLOURS[place % len(COLOURS)]
        values = drawn(_from_run(rule, tried[0]))
        chart.draw(line(values, x="weights", name=rule.name, colour=colour), rule.name, colour)
    return chart


def _from_run(rule: Tried, run: Tried) -> list[float]:
    return [
        exchanged(np.array(list(mine.shares.values())), np.array(list(theirs.shares.values())))
        for mine, theirs in zip(rule.points, run.points, strict=True)
    ]
