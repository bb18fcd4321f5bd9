"""The tables of a comparison, for Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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
    answers = any("exact_match" in variant["metrics"] for variant in variants)
    header = ["variant", "seeds", "mean over sources"]
    header += [f"difference to {baseline}"] if baseline else []
    header += ["worst source", "all tokens", "perplexity", *(["exact match"] if answers else [])]
    rows = []
    for variant in variants:
        metrics = variant["metrics"]
        row = [variant["name"], str(len(variant["seeds"])), spread_text(metrics["mean_loss"])]
        row += [difference_text(metrics["mean_loss"]["difference"])] if baseline else []
        row += [spread_text(metrics[name]) for name in ("worst_loss", "token_loss")]
        row += [spread_text(metrics["perplexity"], 2)]
        row += [spread_text(metrics.get("exact_match"), 3)] if answers else []
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
