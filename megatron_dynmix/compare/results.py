"""What the cells of a comparison recorded, and what follows for each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_dynmix.commands.evaluate import EVALUATION
from megatron_dynmix.compare.cell import Cell, read_json
from megatron_dynmix.compare.interval import CONFIDENCE, paired_difference, spread
from megatron_dynmix.records.jsonl import read_records

BASELINE = "uniform"
"""The variant of this name is what the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A finished cell in numbers."""

    variant: str
    seed: int
    metrics: Mapping[str, float]
    """`mean_loss`, `worst_loss`, `token_loss`, `perplexity`, `loss/<source>`; `exact_match` if checked."""
    worst_source: str
    weights: tuple[tuple[int, tuple[float, ...]], ...]
    """(iteration, share of each source in the rows drawn from there on)."""
    tokens: int
    """Trained on, padding not counted."""
    seconds: float
    """Of the training steps and of weight updates; not of starting, saving and evaluating."""


def read_result(cell: Cell) -> CellResult:
    """Read a finished cell's records."""
    evaluation = read_json(cell.run_dir / EVALUATION)
    assert evaluation is not None, "a cell is finished when it is evaluated"
    metrics = read_records(cell.run_dir / "metrics.jsonl")
    updates = read_records(cell.run_dir / "mixing.jsonl")
    ledger = read_records(cell.run_dir / "ledger.jsonl")
    names = ("mean_loss", "worst_loss", "token_loss", "perplexity", "exact_match")
    values = {name: evaluation[name] for name in names}
    values |= {f"loss/{name}": source and source["loss"] for name, source in evaluation["sources"].items()}
    return CellResult(
        variant=cell.variant.name,
        seed=cell.seed,
        metrics={name: float(value) for name, value in values.items() if value is not None},
        worst_source=evaluation["worst_source"],
        weights=tuple(
            (line["iteration"], tuple(line["weights"])) for line in ledger if line["kind"] == "stage"
        ),
        tokens=sum(metrics[-1]["tokens"].values()),
        seconds=_step_seconds(metrics) + sum(sum(update["seconds"].values()) for update in updates),
    )


def _step_seconds(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all steps: records hold the mean over the iterations since the one before."""
    total, before = 0.0, 0
    for record in metrics:
        total += record["seconds"] * (record["iteration"] - before)
        before = record["iteration"]
    return total


def summarise(
    variants: Sequence[str],
    sources: Sequence[str],
    results: Sequence[CellResult],
    failures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything of `comparison.json`: plain values.

    Args:
        variants: all of the grid, in its order; one without a finished cell has no row.
        sources: of the runs.
        results: of the finished cells.
        failures: `variant`, `seed` and `reason` of the others.

    """
    by_variant = {name: [result for result in results if result.variant == name] for name in variants}
    baseline = by_variant.get(BASELINE, [])
    return {
        "baseline": BASELINE if baseline else None,
        "confidence": CONFIDENCE,
        "sources": list(sources),
        "variants": [_variant_row(name, own, baseline, sources) for name, own in by_variant.items() if own],
        "failures": list(failures),
        "cells": [asdict(result) for result in results],
    }


def _variant_row(
    name: str, own: Sequence[CellResult], baseline: Sequence[CellResult], sources: Sequence[str]
) -> dict[str, Any]:
    metrics = [metric for metric in own[0].metrics if all(metric in result.metrics for result in own)]
    return {
        "name": name,
        "seeds": [result.seed for result in own],
        "metrics": {
            metric: {
                **asdict(spread([result.metrics[metric] for result in own])),
                "difference": _difference(metric, own, baseline),
            }
            for metric in metrics
        },
        "final_weights": {
            source: asdict(spread([result.weights[-1][1][place] for result in own]))
            for place, source in enumerate(sources)
        },
        "tokens": asdict(spread([result.tokens for result in own])),
        "seconds": asdict(spread([result.seconds for result in own])),
    }


def _difference(
    metric: str, own: Sequence[CellResult], baseline: Sequence[CellResult]
) -> dict[str, Any] | None:
    """Paired over the seeds that both have; None if there is none, or for the baseline itself."""
    base = {result.seed: result.metrics[metric] for result in baseline if metric in result.metrics}
    pairs = [(result.metrics[metric], base[result.seed]) for result in own if result.seed in base]
    if not pairs or own[0].variant == baseline[0].variant:
        return None
    found = paired_difference(*zip(*pairs, strict=True))
    return {**asdict(found), "is_clear": found.is_clear}
