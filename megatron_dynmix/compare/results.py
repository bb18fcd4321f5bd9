"""What the cells of a comparison recorded, and what follows for each variant.

That is the mean and the spread over its seeds, and paired differences with their confidence interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import mpmath

from megatron_dynmix.compare.cell import Cell
from megatron_dynmix.mixing.trajectory import Motion, motion
from megatron_dynmix.records.jsonl import read_lines, read_records
from megatron_dynmix.records.schema import MixingUpdate, StageLine, TrainingRecord, step_seconds
from megatron_dynmix.training.evaluate import Evaluation

BASELINE = "uniform"
"""The variant of this name is what the others are compared with."""
CONFIDENCE = 0.95
MEANS = ("mean_loss", "worst_loss", "token_loss", "perplexity")
"""What an evaluation says beside the losses of the sources."""
TASK = "task/"
"""How the names of scores begin."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A finished cell in numbers."""

    variant: str
    seed: int
    metrics: Mapping[str, float]
    """`MEANS`, `loss/<source>`, and `task/<column>`, which are percent or what was imported."""
    worst_source: str
    weights: tuple[tuple[int, tuple[float, ...]], ...]
    """(iteration, share of each source in the rows drawn from there on)."""
    tokens: int
    """Trained on, padding not counted."""
    seconds: float
    """Spent in training steps and weight updates; not of starting, saving and evaluating."""

    @property
    def motion(self) -> Motion:
        """How the weights moved."""
        iterations, weights = zip(*self.weights, strict=True)
        return motion(iterations, weights)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell that did not finish."""

    variant: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and where it lies with `CONFIDENCE`."""

    mean: float
    low: float | None
    """None for a single pair, which tells nothing of the spread."""
    high: float | None
    count: int
    is_clear: bool
    """Whether the interval leaves out zero."""


@dataclass(frozen=True)
class Spread:
    """One quantity over the seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for a single value."""
    count: int


@dataclass(frozen=True)
class Metric(Spread):
    """A metric of a variant."""

    difference: Difference | None
    """To the baseline; None for the baseline itself, and without a seed that both have."""


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """What the finished cells of a variant say together."""

    name: str
    seeds: list[int]
    metrics: Mapping[str, Metric]
    """Those that all its cells have."""
    final_weights: Mapping[str, Spread]
    motion: Mapping[str, Spread]
    """How the weights moved: the fields of `Motion`."""
    tokens: Spread
    seconds: Spread


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `comparison.json` holds."""

    baseline: str | None
    """None without a finished cell of that name."""
    confidence: float
    sources: list[str]
    variants: list[VariantResult]
    """In the order of the grid; those without a finished cell are left out."""
    failures: list[Failure]
    cells: list[CellResult]


def read_result(cell: Cell) -> CellResult:
    """Read a finished cell's records."""
    evaluation = Evaluation.read(cell.run_dir)
    assert evaluation is not None, "a cell is finished when it is evaluated"
    metrics = read_lines(cell.run_dir / "metrics.jsonl", TrainingRecord)
    updates = read_lines(cell.run_dir / "mixing.jsonl", MixingUpdate)
    ledger = read_records(cell.run_dir / "ledger.jsonl")
    stages = [StageLine.from_json(line) for line in ledger if line["kind"] == "stage"]
    losses = {f"loss/{name}": held.loss for name, held in evaluation.sources.items() if held}
    scores = {f"{TASK}{name}": score for name, score in cell.scores().items()}
    return CellResult(
        variant=cell.variant.name,
        seed=cell.seed,
        metrics={name: getattr(evaluation, name) for name in MEANS} | losses | scores,
        worst_source=evaluation.worst_source,
        weights=tuple((stage.iteration, tuple(stage.weights)) for stage in stages),
        tokens=sum(metrics[-1].tokens.values()),
        seconds=step_seconds(metrics) + sum(sum(update.seconds.values()) for update in updates),
    )


def compared(
    variants: Sequence[str], sources: Sequence[str], cells: Sequence[CellResult], failures: Sequence[Failure]
) -> Comparison:
    """Set the finished cells of all variants, in their order, side by side."""
    by_variant = {name: [cell for cell in cells if cell.variant == name] for name in variants}
    baseline = by_variant.get(BASELINE, [])
    return Comparison(
        baseline=BASELINE if baseline else None,
        confidence=CONFIDENCE,
        sources=list(sources),
        variants=[_variant(name, own, baseline, sources) for name, own in by_variant.items() if own],
        failures=list(failures),
        cells=list(cells),
    )


def _variant(
    name: str, own: Sequence[CellResult], baseline: Sequence[CellResult], sources: Sequence[str]
) -> VariantResult:
    metrics = [metric for metric in own[0].metrics if all(metric in cell.metrics for cell in own)]
    return VariantResult(
        name=name,
        seeds=[cell.seed for cell in own],
        metrics={
            metric: Metric(
                **asdict(spread([cell.metrics[metric] for cell in own])),
                difference=None if name == BASELINE else _difference(metric, own, baseline),
            )
            for metric in metrics
        },
        final_weights={
            source: spread([cell.weights[-1][1][place] for cell in own])
            for place, source in enumerate(sources)
        },
        motion={
            field: spread([getattr(cell.motion, field) for cell in own])
            for field in ("settled", "turns", "path", "net")
        },
        tokens=spread([cell.tokens for cell in own]),
        seconds=spread([cell.seconds for cell in own]),
    )


def _difference(metric: str, own: Sequence[CellResult], baseline: Sequence[CellResult]) -> Difference | None:
    """Return it over the seeds that both have; None where there are none."""
    base = {cell.seed: cell.metrics[metric] for cell in baseline if metric in cell.metrics}
    pairs = [(cell.metrics[metric], base[cell.seed]) for cell in own if cell.seed in base]
    return paired_difference(*zip(*pairs, strict=True)) if pairs else None


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation of one value or more."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return how far `values` lie from the `baseline` of the same seeds: mean ± t(0.975, n - 1) sd / sqrt(n).

    Student's paired t interval: differences of the same seed are what is normally distributed, not the
    values themselves, which share what the seed decides.
    """
    found = spread([value - base for value, base in zip(values, baseline, strict=True)])
    if found.sd is None:
        return Difference(found.mean, None, None, found.count, is_clear=False)
    half = student_t(CONFIDENCE, found.count - 1) * found.sd / math.sqrt(found.count)
    low, high = found.mean - half, found.mean + half
    return Difference(found.mean, low, high, found.count, is_clear=low > 0 or high < 0)


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
