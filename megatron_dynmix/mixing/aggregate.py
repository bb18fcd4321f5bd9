"""From distances between sources to the score ``delta`` of each.

Axes: D sources.
"""

import numpy as np
from numpy.typing import NDArray

REFERENCE_GAP = 1 / 64
"""Gap between scores after normalisation: the published rule's, with 4 sources and 8 experts, are of this
size, so that the published step size stays what it is."""
NO_GAP = 1e-9
"""Gaps below this part of the scores are rounding, and are not blown up."""
AGGREGATES = ("mean", "max", "min", "others-mean", "others-max", "others-min")


def source_delta(distance_DD: NDArray[np.float64], aggregate: str) -> NDArray[np.float64]:
    """Score of each source: larger means further from the others, hence less redundant.

    Args:
        distance_DD: symmetric distances, diagonal 0; for ``others-*`` of at least two sources.
        aggregate: ``"mean"`` is Delta_i = sum_j delta_ij / D of Zhu et al. (2025), section 3: divided by D,
            though only D - 1 terms can be positive. ``"max"`` and ``"min"`` are the official code's other
            two: the furthest source, and the nearest with the source itself among them, so always 0.
            ``"others-mean"``, ``"others-max"`` (the same as ``"max"``) and ``"others-min"`` leave the source
            itself out.

    Raises:
        ValueError: not a square finite matrix, or another aggregate.

    """
    if (
        distance_DD.ndim != 2
        or distance_DD.shape[0] != distance_DD.shape[1]
        or not np.isfinite(distance_DD).all()
    ):
        raise ValueError(f"distances of shape {distance_DD.shape} must be [sources, sources] and finite")
    match aggregate:
        case "mean":
            return np.asarray(distance_DD.mean(axis=1))
        case "max" | "others-max":
            return np.asarray(distance_DD.max(axis=1))
        case "min":
            return np.asarray(distance_DD.min(axis=1))
        case "others-mean":
            return np.asarray(distance_DD.sum(axis=1) / (len(distance_DD) - 1))
        case "others-min":
            return np.asarray(_without_self(distance_DD).min(axis=1))
    raise ValueError(f"aggregate {aggregate!r} is unknown; give one of {AGGREGATES}")


def delta_shares(distance_DD: NDArray[np.float64], aggregate: str) -> NDArray[np.float64]:
    """How much of each distance is in each score: d delta_i / d distance_ij, with which ``delta`` is linear.

    Args:
        distance_DD: as for `source_delta`.
        aggregate: as for `source_delta`, one of `AGGREGATES`.

    Returns:
        share_DD; for a furthest or nearest source 1, even where two are equally far.

    """
    number = len(distance_DD)
    match aggregate:
        case "mean":
            return np.full_like(distance_DD, 1 / number)
        case "others-mean":
            return np.full_like(distance_DD, 1 / (number - 1))
        case "min":
            return np.zeros_like(distance_DD)
        case "others-min":
            return np.asarray(np.eye(number)[_without_self(distance_DD).argmin(axis=1)])
    return np.asarray(np.eye(number)[distance_DD.argmax(axis=1)])


def gap_scale(delta_D: NDArray[np.float64]) -> float:
    """Factor that brings the gaps between scores to `REFERENCE_GAP`.

    Only the gaps delta_i - mean(delta) move weights. Their size, for the same differences between sources,
    hangs on what is no property of the sources. For n experts l2 falls like 1 / sqrt(n) (see `l2_scale`). If
    sources differ at random, with deviations u of the same size for every expert, then |u_i - u_j|^2 also
    comes closer to its mean relative to it, by another 1 / sqrt(n): so gaps fall like 1 / sqrt(n) to 1 / n.
    A mean over D with the source itself adds (D - 1) / D. No formula in D and n fits all of that, so the size
    that is expected of a gap is taken from the scores themselves: their standard deviation over the sources.

    A step is then the same in size however alike the sources are; noise must be kept out by other means.

    Args:
        delta_D: scores.

    Returns:
        The factor; 1 where the scores are equal to rounding.

    """
    spread = float(delta_D.std())
    return REFERENCE_GAP / spread if spread > NO_GAP * float(np.abs(delta_D).max()) else 1.0


def _without_self(distance_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.eye(len(distance_DD), dtype=bool), np.inf, distance_DD)
