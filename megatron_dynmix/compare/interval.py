"""Mean, spread, and paired differences with their confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import mpmath

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Several values of one quantity."""

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
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of one value or more."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """How far `values` lie from `baseline`, pair by pair: mean ± t(0.975, n - 1) sd / sqrt(n).

    Student's paired t interval: differences of the same seed are what is normally distributed, not the
    values themselves, which share what the seed decides.

    Args:
        values: one for each seed.
        baseline: of the same seeds.

    """
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    found = spread(differences)
    if found.sd is None:
        return Difference(found.mean, None, None, found.count)
    half = student_t(CONFIDENCE, found.count - 1) * found.sd / math.sqrt(found.count)
    return Difference(found.mean, found.mean - half, found.mean + half, found.count)


def student_t(confidence: float, degrees: int) -> float:
    """The t for which |T| <= t with the probability `confidence`.

    P(|T| > t) = I_x(n / 2, 1 / 2) with x = n / (n + t²), the regularised incomplete beta function
    (Abramowitz and Stegun, 26.7.1); solved for x, which lies between 0 and 1.

    Args:
        confidence: two-sided, between 0 and 1.
        degrees: n, degrees of freedom, 1 or more.

    """

    def beyond(x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True) - (1 - confidence)

    x = mpmath.findroot(beyond, (0, 1), solver="ridder")
    return float(mpmath.sqrt(degrees * (1 - x) / x))
