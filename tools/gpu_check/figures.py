"""What is figured from what was measured. Axes: P pairs of iterations, K spans of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def training_flops(active: int, embedding: int, layers: int, width: int, seq_length: int) -> float:
    """Return the floating-point operations that training takes for a position.

    As in Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B): 6 for every parameter that the position
    meets, of `active` all but the input `embedding`, which is looked up; and 12 for each of `layers`, element
    of its `width` (heads x their size) and key, of which a causal mask leaves half. Recomputation is no use.
    """
    return 6.0 * (active - embedding) + 12.0 * layers * width * seq_length / 2


def tokens_per_second(positions: int, seconds_P: NDArray[np.float64]) -> float:
    """Return the positions of an iteration over its median time."""
    return positions / float(np.median(seconds_P))


def utilization(flops: float, per_second: float, peak: float) -> float:
    """Return MFU: the operations that positions so many a second need, of `peak` operations a second."""
    return flops * per_second / peak


def idle_share(spans_K: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """Return the part of the time from begin to end in which no span (start, end) runs; spans may overlap."""
    busy, reached = 0.0, begin
    for start, stop in sorted(spans_K):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            busy += stop - start
            reached = stop
    return 1.0 - busy / (end - begin)


def ratio_of_pairs(one_P: NDArray[np.float64], other_P: NDArray[np.float64]) -> dict[str, float]:
    """Return the median of the pairs' ratios and their quartiles."""
    names = ("ratio", "ratio_q1", "ratio_q3")
    return dict(zip(names, np.quantile(one_P / other_P, [0.5, 0.25, 0.75]).tolist(), strict=True))


def largest_difference(seen: Sequence[float], recorded: Sequence[float]) -> float:
    """Return the largest relative difference of two equally long lists; infinite if one is not finite."""
    if len(seen) != len(recorded):
        raise ValueError(f"{len(seen)} values seen, {len(recorded)} recorded")
    seen_N, recorded_N = np.array(seen, np.float64), np.array(recorded, np.float64)
    apart_N = np.abs(seen_N - recorded_N) / np.abs(recorded_N)
    return float(np.where(np.isfinite(apart_N), apart_N, np.inf).max(initial=0.0))
