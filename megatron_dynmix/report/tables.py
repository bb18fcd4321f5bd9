"""The tables of a page; a chart's numbers can be read without seeing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from megatron_dynmix.mixing.trajectory import NEAR
from megatron_dynmix.report.run import Frame, Run, end_losses, end_weights

MOTION = (
    f"Settled at: the iteration from which on each weight stays within {NEAR} of the last. Turns: changes of "
    "direction of the weight that did so most. Path and net: the share of the mix that was exchanged, over "
    "all steps and between first and last weights."
)
"""How to read the numbers of `mixing.trajectory`."""
MOST_EVENTS = 200
MOST_PAIRS = 12


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Bold(str):
    """A cell that stands out."""

    __slots__ = ()

    def __html__(self) -> Markup:
        """Return the cell as a page has it."""
        return Markup("<strong>{}</strong>").format(str(self))


def text(value: float | None, form: str = ".4g") -> str:
    """Return a number as text, or a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def sources_table(run: Run) -> Table:
    """Return each source from the start of the run to its end."""
    first = run.weights[0].shares if run.weights else {}
    last = run.weights[-1].shares if run.weights else {}
    losses = [record.losses for record in run.metrics]
    tokens = run.metrics[-1].tokens if run.metrics else {}
    whole = sum(value for value in tokens.values() if value > 0)
    update = run.updates[-1] if run.updates else None
    rows = []
    for name in run.sources:
        seen = [loss[name] for loss in losses if math.isfinite(loss.get(name, math.nan))]
        rows.append(
            [
                name,
                *(text(first.get(name), ".3f"), text(last.get(name), ".3f")),
                text(last.get(name, math.nan) - first.get(name, math.nan), "+.3f"),
                *(text(seen[0] if seen else None), text(seen[-1] if seen else None)),
                text(update.delta.get(name) if update else None),
                text(tokens.get(name), ",.0f"),
                text(tokens.get(name, math.nan) / whole if whole else None, ".1%"),
                text(update.epochs.get(name) if update else None, ".2f"),
            ]
        )
    header = ["source", "first weight", "last weight", "change", "first loss", "last loss"]
    header += ["last delta", "tokens", "share of tokens", "epochs"]
    return Table("Sources", header, rows, "Weights are shares of the rows drawn; losses in nats per token.")


def course_table(title: str, curves: Mapping[str, Sequence[float]]) -> Table:
    """Return first, lowest, median, highest and last value of each curve that has any."""
    rows = []
    for name, values in curves.items():
        if found := [value for value in values if math.isfinite(value)]:
            numbers = (found[0], min(found), float(np.median(found)), max(found), found[-1])
            rows.append([name, *map(text, numbers)])
    return Table(title, ["", "first", "lowest", "median", "highest", "last"], rows)


def pairs(frame: Frame) -> list[tuple[float, str, str]]:
    """Return the distances of all pairs of sources, nearest first."""
    names = frame.sources
    return sorted(
        (float(frame.values_RC[one, other]), names[one], names[other])
        for one in range(len(names))
        for other in range(one + 1, len(names))
        if math.isfinite(frame.values_RC[one, other])
    )


def distance_table(frame: Frame) -> Table:
    """Return the nearest and the farthest pairs at the last update."""
    found = pairs(frame)
    note = f"At iteration {frame.iteration}."
    if len(found) > 2 * MOST_PAIRS:
        note += f" The {MOST_PAIRS} nearest and the {MOST_PAIRS} farthest of {len(found):,} pairs."
        found = found[:MOST_PAIRS] + found[-MOST_PAIRS:]
    rows = [[f"{one} – {other}", text(distance)] for distance, one, other in found]
    return Table("Pairs of sources", ["pair", "distance"], rows, note)


def events_table(run: Run) -> Table:
    """Return what happened, in order; of many events, the last."""
    events = run.events[-MOST_EVENTS:]
    rows = [[str(event.iteration), event.kind, event.text] for event in events]
    note = ""
    if len(events) < len(run.events):
        note = f"The last {MOST_EVENTS} of {len(run.events):,}; all are in mixing.jsonl and events.jsonl."
    return Table("Events", ["iteration", "kind", "what"], rows, note)


def runs_table(runs: Mapping[str, Run]) -> Table:
    """Return one line for each run, by name."""
    rows = []
    for name, run in runs.items():
        seconds = run.step_seconds + run.mixing_seconds
        rows.append(
            [
                name,
                str(run.setting("mixing", "strategy") or "–"),
                str(run.setting("training", "seed") or "–"),
                f"{run.iteration:,} of {run.train_iters or '?'}",
                text(run.metrics[-1].lm_loss if run.metrics else None),
                text(run.updates[-1].entropy if run.updates else None),
                text(seconds or None, ",.1f"),
                text(run.mixing_seconds / seconds if seconds else None, ".2%"),
            ]
        )
    header = ["run", "strategy", "seed", "iterations", "last loss", "entropy", "seconds", "of them mixing"]
    note = "Training losses of runs with other mixes are means over other data: compare held-out losses "
    return Table("Runs", header, rows, note + "(megatron-dynmix evaluate) before you prefer one.")


def end_weights_table(runs: Mapping[str, Run]) -> Table:
    """Return the weights of runs, by name, after their last update."""
    return _beside("Last weights", {name: end_weights(run) for name, run in runs.items()}, ".3f")


def end_losses_table(runs: Mapping[str, Run]) -> Table:
    """Return the last losses of runs, by name, in nats per token."""
    return _beside("Last losses of the sources", {name: end_losses(run) for name, run in runs.items()}, ".4f")


def _beside(title: str, columns: Mapping[str, Mapping[str, float]], form: str) -> Table:
    sources = dict.fromkeys(source for values in columns.values() for source in values)
    rows = [[source, *(text(values.get(source), form) for values in columns.values())] for source in sources]
    return Table(title, ["source", *columns], rows)
