"""The tables of a comparison, for Markdown and HTML alike.

The tables of a page; a chart's numbers can be read without seeing it.

Axes: D sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dynmix.report.run import Frame, Run, end_losses, end_weights


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def comparison_tables(summary: Mapping[str, Any]) -> list[Table]:
    """All tables of a comparison (see `results.summarise`)."""
    tables = [] if not summary["variants"] else [_losses(summary), _sources(summary), _weights(summary)]
    if summary["failures"]:
        rows = [
            [failure["variant"], str(failure["seed"]), failure["reason"]] for failure in summary["failures"]
        ]
        tables.append(Table("Failed cells", ["variant", "seed", "why"], rows))
    return tables


def _losses(summary: Mapping[str, Any]) -> Table:
    baseline, variants = summary["baseline"], summary["variants"]
    header = ["variant", "seeds", "mean over sources"]
    header += [f"difference to {baseline}"] if baseline else []
    header += ["worst source", "all tokens", "perplexity"]
    rows = []
    for variant in variants:
        metrics = variant["metrics"]
        row = [variant["name"], str(len(variant["seeds"])), spread_text(metrics["mean_loss"])]
        row += [difference_text(metrics["mean_loss"]["difference"])] if baseline else []
        row += [spread_text(metrics[name]) for name in ("worst_loss", "token_loss")]
        row += [spread_text(metrics["perplexity"], 2)]
        rows.append(row)
    return Table("Held-out loss", header, rows, _note(summary))


def _note(summary: Mapping[str, Any]) -> str:
    """What must be known to read the first table."""
    sentences = ["Nats per trained token, mean ± standard deviation over the seeds; lower is better."]
    if summary["baseline"] is None:
        sentences.append("No variant is named uniform, so there is nothing to take differences to.")
    elif any(len(variant["seeds"]) > 1 for variant in summary["variants"]):
        sentences.append(
            f"Differences are paired by seed, with the {summary['confidence']:.0%} confidence interval in "
            "brackets (Student's t); bold where it leaves out zero."
        )
    if any(len(variant["seeds"]) == 1 for variant in summary["variants"]):
        sentences.append("Of one seed there is no standard deviation and no interval.")
    without = {
        source
        for source in summary["sources"]
        if any(f"loss/{source}" not in variant["metrics"] for variant in summary["variants"])
    }
    if without:
        sentences.append(f"Without held-out rows, and in no mean: {', '.join(sorted(without))}.")
    return " ".join(sentences)


def _sources(summary: Mapping[str, Any]) -> Table:
    rows = [
        [
            variant["name"],
            *(spread_text(variant["metrics"].get(f"loss/{source}")) for source in summary["sources"]),
        ]
        for variant in summary["variants"]
    ]
    return Table("Held-out loss of each source", ["variant", *summary["sources"]], rows)


def _weights(summary: Mapping[str, Any]) -> Table:
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
    """`mean ± sd`, the mean alone for a single value."""
    if spread is None:
        return "-"
    text = f"{spread['mean']:.{digits}f}"
    return text if spread["sd"] is None else f"{text} ± {spread['sd']:.{digits}f}"


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """`mean [low, high]`, bold where the interval leaves out zero."""
    if difference is None:
        return "-"
    text = f"{difference['mean']:+.4f}"
    if difference["low"] is not None:
        text += f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return f"**{text}**" if difference["is_clear"] else text


MOST_EVENTS = 200
MOST_PAIRS = 12


def text(value: float | None, form: str = ".4g") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def sources_table(run: Run) -> Table:
    """Each source from the start of the run to its end."""
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


def course_table(title: str, curves: Sequence[tuple[str, Sequence[float]]]) -> Table:
    """First, lowest, median, highest and last value of each curve."""
    rows = []
    for name, values in curves:
        found = [value for value in values if math.isfinite(value)]
        if not found:
            continue
        middle = float(np.median(found))
        numbers = (found[0], min(found), middle, max(found), found[-1])
        rows.append([name, *(text(value) for value in numbers)])
    return Table(title, ["", "first", "lowest", "median", "highest", "last"], rows)


def pairs(frame: Frame) -> list[tuple[float, str, str]]:
    """Distances of all pairs of sources, nearest first."""
    names = frame.sources
    found = [
        (float(frame.values_RC[one, other]), names[one], names[other])
        for one in range(len(names))
        for other in range(one + 1, len(names))
        if math.isfinite(frame.values_RC[one, other])
    ]
    return sorted(found)


def distance_table(frame: Frame) -> Table:
    """The nearest and the farthest pairs at the last update."""
    found = pairs(frame)
    note = f"At iteration {frame.iteration}."
    if len(found) > 2 * MOST_PAIRS:
        note += f" The {MOST_PAIRS} nearest and the {MOST_PAIRS} farthest of {len(found):,} pairs."
        found = found[:MOST_PAIRS] + found[-MOST_PAIRS:]
    rows = [[f"{one} – {other}", text(distance)] for distance, one, other in found]
    return Table("Pairs of sources", ["pair", "distance"], rows, note)


def events_table(run: Run) -> Table:
    """What happened, in order; of many, the last."""
    events = run.events[-MOST_EVENTS:]
    rows = [[str(event.iteration), event.kind, event.text] for event in events]
    note = ""
    if len(events) < len(run.events):
        note = f"The last {MOST_EVENTS} of {len(run.events):,}; all are in mixing.jsonl and events.jsonl."
    return Table("Events", ["iteration", "kind", "what"], rows, note)


def runs_table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """One line for each run."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        loss = run.metrics[-1].lm_loss if run.metrics else None
        seconds = run.step_seconds + run.mixing_seconds
        rows.append(
            [
                name,
                str(run.setting("mixing", "strategy") or "–"),
                str(run.setting("training", "seed") or "–"),
                f"{run.iteration:,} of {run.train_iters or '?'}",
                text(loss),
                text(run.updates[-1].entropy if run.updates else None),
                text(seconds or None, ",.1f"),
                text(run.mixing_seconds / seconds if seconds else None, ".2%"),
            ]
        )
    header = ["run", "strategy", "seed", "iterations", "last loss", "entropy", "seconds", "of them mixing"]
    note = "Training losses of runs with other mixes are means over other data: compare held-out losses "
    return Table("Runs", header, rows, note + "(megatron-dynmix evaluate) before you prefer one.")


def end_weights_table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """Weights after the last update."""
    return _beside("Last weights", names, [end_weights(run) for run in runs], ".3f")


def end_losses_table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """Last losses in nats per token."""
    return _beside("Last losses of the sources", names, [end_losses(run) for run in runs], ".4f")


def _beside(title: str, names: Sequence[str], found: Sequence[Mapping[str, float]], form: str) -> Table:
    sources = dict.fromkeys(source for values in found for source in values)
    rows = [[source, *(text(values.get(source), form) for values in found)] for source in sources]
    return Table(title, ["source", *names], rows)
