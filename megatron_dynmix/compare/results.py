"""What the cells of a comparison recorded, and what follows for each variant.

That is the mean and the spread over its seeds, and paired differences with their confidence interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mpmath

from megatron_dynmix.compare.cell import Cell
from megatron_dynmix.records.jsonl import read_lines, read_records
from megatron_dynmix.records.schema import MixingUpdate, StageLine, TrainingRecord, step_seconds
from megatron_dynmix.training.evaluate import Evaluation

BASELINE = "uniform"
"""The variant of this name is what the others are compared with."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """One quantity of several seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for a single value."""
    count: int


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and where it lies with `CONFIDENCE`."""

    mean: float
    low: float | None
    """None for a single pair, which tells nothing of the spread."""
    high: float | None
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation of one value or more."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return how far `values` lie from the `baseline` of the same seeds: mean ± t(0.975, n - 1) sd / sqrt(n).

    Student's paired t interval: differences of the same seed are what is normally distributed, not the
    values themselves, which share what the seed decides.
    """
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    found = spread(differences)
    if found.sd is None:
        return Difference(found.mean, None, None, found.count)
    half = student_t(CONFIDENCE, found.count - 1) * found.sd / math.sqrt(found.count)
    return Difference(found.mean, found.mean - half, found.mean + half, found.count)


def student_t(confidence: float, degrees: int) -> float:
    """Return the t for which |T| <= t with the probability `confidence`.

    P(|T| > t) = I_x(n / 2, 1 / 2) with x = n / (n + t²), the regularised incomplete beta function
    (Abramowitz and Stegun, 26.7.1); solved for x, which lies between 0 and 1.

    Args:
        confidence: two-sided, between 0 and 1.
        degrees: of freedom, n, 1 or more.

    """

    def beyond(x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True) - (1 - confidence)

    x = mpmath.findroot(beyond, (0, 1), solver="ridder")
    return float(mpmath.sqrt(degrees * (1 - x) / x))


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A finished cell in numbers."""

    variant: str
    seed: int
    metrics: Mapping[str, float]
    """`mean_loss`, `worst_loss`, `token_loss`, `perplexity`, `loss/<source>`."""
    worst_source: str
    weights: tuple[tuple[int, tuple[float, ...]], ...]
    """(iteration, share of each source in the rows drawn from there on)."""
    tokens: int
    """Trained on, padding not counted."""
    seconds: float
    """Of the training steps and of weight updates; not of starting, saving and evaluating."""


def read_result(cell: Cell) -> CellResult:
    """Read a finished cell's records."""
    evaluation = Evaluation.read(cell.run_dir)
    assert evaluation is not None, "a cell is finished when it is evaluated"
    metrics = read_lines(cell.run_dir / "metrics.jsonl", TrainingRecord)
    updates = read_lines(cell.run_dir / "mixing.jsonl", MixingUpdate)
    ledger = read_records(cell.run_dir / "ledger.jsonl")
    names = ("mean_loss", "worst_loss", "token_loss", "perplexity")
    return CellResult(
        variant=cell.variant.name,
        seed=cell.seed,
        metrics={
            **{name: getattr(evaluation, name) for name in names},
            **{f"loss/{name}": held.loss for name, held in evaluation.sources.items() if held},
        },
        worst_source=evaluation.worst_source,
        weights=tuple(
            (stage.iteration, tuple(stage.weights))
            for stage in (StageLine.from_json(line) for line in ledger if line["kind"] == "stage")
        ),
        tokens=sum(metrics[-1].tokens.values()),
        seconds=step_seconds(metrics) + sum(sum(update.seconds.values()) for update in updates),
    )


def summarise(
    variants: Sequence[str],
    sources: Sequence[str],
    results: Sequence[CellResult],
    failures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the content of `comparison.json`: plain values.

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
    """Return it over the seeds that both have; None where there are none, and for the baseline itself."""
    base = {result.seed: result.metrics[metric] for result in baseline if metric in result.metrics}
    pairs = [(result.metrics[metric], base[result.seed]) for result in own if result.seed in base]
    if not pairs or own[0].variant == baseline[0].variant:
        return None
    found = paired_difference(*zip(*pairs, strict=True))
    return {**asdict(found), "is_clear": found.is_clear}
