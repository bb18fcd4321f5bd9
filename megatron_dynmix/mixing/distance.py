"""How far apart the sources' gate loads are.

Axes: D sources, E experts (of all layers that are compared as one).

From distances between sources to the score ``delta`` of each.

Axes: D sources.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import SourceError

PUBLISHED_EXPERTS = 8
"""Experts per layer of the model for which the published step size was chosen."""
CLOSE = 0.1
"""Squared distance, relative to the squared lengths, below which rounding would show in a product form."""


def l2_distance(load_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean distance between every two rows: delta_ij = ||O_i - O_j||_2, Zhu et al. (2025), section 3.

    Returns:
        distance_DD, symmetric, its diagonal exactly 0.

    Raises:
        ValueError: not two axes, or a NaN or infinite load.

    """
    if load_DE.ndim != 2:
        raise ValueError(f"loads of shape {load_DE.shape} must be [sources, experts] and finite")
    # All pairs by one matrix product, about their mean: |a - b|^2 = |a|^2 + |b|^2 - 2 ab. Where that would
    # cancel digits the pair is taken again by its difference.
    centred_DE = load_DE - load_DE.mean(axis=0)
    product_DD = centred_DE @ centred_DE.T
    if not np.isfinite(product_DD).all():
        raise ValueError(f"loads of shape {load_DE.shape} must be [sources, experts] and finite")
    lengths_DD = product_DD.diagonal()[:, None] + product_DD.diagonal()
    squared_DD = np.triu(lengths_DD - 2 * product_DD, k=1)
    for i, j in np.argwhere(np.triu(squared_DD <= CLOSE * lengths_DD, k=1)):
        difference_E = load_DE[i] - load_DE[j]
        squared_DD[i, j] = difference_E @ difference_E
    distance_DD = np.sqrt(squared_DD)
    return np.asarray(distance_DD + distance_DD.T)


def l2_scale(num_columns: int) -> float:
    """Factor that makes l2 distances comparable over numbers of experts.

    Let the load of an expert be (1 + u) / n, n experts in all. Then ||O_i - O_j||_2 is
    sqrt(sum (u_i - u_j)^2) / n = rms(u_i - u_j) / sqrt(n): for the same relative deviations from an even
    load, l2 falls like 1 / sqrt(n). sqrt(n) undoes that, and dividing by sqrt(8) leaves l2 as it is for the 8
    experts of one layer, for which the published step size was chosen.
    """
    return math.sqrt(num_columns / PUBLISHED_EXPERTS)


def scaled_l2_distance(load_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    """`l2_distance` times `l2_scale`; the same for 8 experts."""
    return l2_distance(load_DE) * l2_scale(load_DE.shape[-1])


def cosine_distance(load_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    """One minus the cosine similarity of every two rows.

    Returns:
        distance_DD, symmetric, its diagonal exactly 0.

    Raises:
        ValueError: not two axes, a NaN or infinite load, or a row of zeros (it has no direction).

    """
    length_D = np.linalg.norm(load_DE, axis=-1)
    if (length_D == 0).any():
        raise SourceError([int(np.argmin(length_D))], "has a load of zeros: no direction")
    # For unit vectors 1 - cos = |u - v|^2 / 2. This form gives 0 for equal loads and keeps the digits
    # of close ones, which 1 - u.v loses.
    return l2_distance(load_DE / length_D[..., None]) ** 2 / 2


def hellinger_distance(load_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hellinger distance: ||sqrt(O_i) - sqrt(O_j)||_2 / sqrt(2), from 0 to 1 (no expert in common)."""
    return l2_distance(np.sqrt(load_DE)) / math.sqrt(2)


def js_distance(load_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jensen-Shannon distance: the square root of the divergence in nats, from 0 to sqrt(log 2).

    With m = (p + q) / 2, JS = (KL(p || m) + KL(q || m)) / 2 (Lin 1991; Endres and Schindelin 2003 for its
    root being a metric).
    """
    return _row_by_row(load_DE, lambda p_E, q_DE: np.sqrt(_js_divergence(p_E, q_DE)))


def tv_distance(load_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Total variation: sum |O_i - O_j| / 2, the share of choices that would have to move; from 0 to 1."""
    return _row_by_row(load_DE, lambda p_E, q_DE: np.abs(q_DE - p_E).sum(axis=1) / 2)


def _row_by_row(
    load_DE: NDArray[np.float64],
    distance: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Distances of every two rows. All pairs at once would take D * D * E floats."""
    if load_DE.ndim != 2 or not np.isfinite(load_DE).all():
        raise ValueError(f"loads of shape {load_DE.shape} must be [sources, experts] and finite")
    distance_DD = np.zeros((len(load_DE), len(load_DE)))
    for i in range(len(load_DE) - 1):
        distance_DD[i, i + 1 :] = distance(load_DE[i], load_DE[i + 1 :])
    return distance_DD + distance_DD.T


def _js_divergence(p_E: NDArray[np.float64], q_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    # With x = (p - q) / (p + q), p log(p / m) = m (1 + x) log(1 + x), and q the same with -x. For close loads
    # this keeps digits that entropies would lose, and it is 0 for equal ones.
    sum_DE = p_E + q_DE
    x_DE = np.divide(p_E - q_DE, sum_DE, out=np.zeros_like(sum_DE), where=sum_DE > 0)
    terms_DE = _xlog(1 + x_DE, x_DE) + _xlog(1 - x_DE, -x_DE)
    return np.asarray(np.maximum((sum_DE * terms_DE).sum(axis=-1) / 4, 0.0))


def _xlog(factor: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``factor * log(1 + x)``, 0 where the factor is 0."""
    return factor * np.log1p(x, out=np.zeros_like(x), where=factor > 0)


DISTANCES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "l2": l2_distance,
    "scaled-l2": scaled_l2_distance,
    "cos": cosine_distance,
    "hellinger": hellinger_distance,
    "js": js_distance,
    "tv": tv_distance,
}


def gradient(metric: str, p_E: NDArray[np.float64], q_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    """How the distances of one load to others change with it: d distance(p, q_j) / d p.

    Args:
        metric: a key of `DISTANCES`.
        p_E: the load that varies.
        q_DE: the others, which do not.

    Returns:
        gradient_DE. 0 where it does not exist: for equal loads, and for experts that `p_E` leaves idle.

    """
    difference_DE = p_E - q_DE
    match metric:
        case "l2":
            return _unit(difference_DE)
        case "scaled-l2":
            return _unit(difference_DE) * l2_scale(len(p_E))
        case "cos":
            length = np.linalg.norm(p_E)
            p_E, q_DE = p_E / length, q_DE / np.linalg.norm(q_DE, axis=1, keepdims=True)
            return np.asarray(((q_DE @ p_E)[:, None] * p_E - q_DE) / length)
        case "hellinger":
            root_E = np.sqrt(p_E)
            steep_E = np.divide(1, 2 * root_E, out=np.zeros_like(p_E), where=p_E > 0)
            return np.asarray(_unit(root_E - np.sqrt(q_DE)) * steep_E / math.sqrt(2))
        case "js":
            distance_D1 = np.sqrt(_js_divergence(p_E, q_DE))[:, None]
            x_DE = np.divide(difference_DE, p_E + q_DE, out=np.zeros_like(q_DE), where=p_E > 0)
            return _quotient(np.log1p(x_DE), 4 * distance_D1)
        case "tv":
            return np.asarray(np.sign(difference_DE) / 2)
    raise AssertionError(f"metric {metric} has no gradient")


def _unit(vector_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    return _quotient(vector_DE, np.linalg.norm(vector_DE, axis=1, keepdims=True))


def _quotient(numerator: NDArray[np.float64], divisor: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 where the divisor is 0."""
    quotient = np.divide(numerator, divisor, out=np.zeros_like(numerator), where=divisor > 0)
    return np.asarray(quotient)


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
