"""From counts to gate loads, from gate loads to distances, from distances to the score of each source.

A gate load is the share of a source's routed tokens that each expert received. Axes: D sources, L MoE layers,
E experts; H = 2 halves may stand before them. Loads are compared as vectors: all layers and experts of a
source are one vector of V = L * E.
"""

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from megatron_dynmix.mixing.strategy import Counts, SourceError
from megatron_dynmix.mixing.weights import Floats


def check_layers(layers: str | Sequence[int]) -> None:
    """Raise ValueError unless ``layers`` is ``"last"``, ``"all"`` or distinct indices >= 0, at least one."""
    if isinstance(layers, str):
        if layers not in ("last", "all"):
            raise ValueError(
                f"layers {layers!r} is unknown; give 'last', 'all' or a list of zero-based indices"
            )
    elif (
        len(layers) == 0
        or len(set(layers)) < len(layers)
        or not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
    ):
        raise ValueError(f"layers {list(layers)} are not distinct indices >= 0, at least one")


def select_layers(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """Choose among the MoE layers of a model: ``"last"``, ``"all"``, or indices that count no dense layers.

    The paper takes the last: deeper layers are more specialized.
    """
    if num_layers < 1:
        raise ValueError(f"the model has {num_layers} MoE layers; a gate load needs at least one")
    check_layers(layers)
    if layers == "last":
        return [num_layers - 1]
    if layers == "all":
        return list(range(num_layers))
    chosen = [int(layer) for layer in layers]
    if max(chosen) >= num_layers:
        raise ValueError(
            f"layer {max(chosen)} was chosen, but the model has {num_layers} MoE layers; "
            f"give indices from 0 to {num_layers - 1} (dense layers are not counted)"
        )
    return chosen


def at_layers(counts_DLE: Counts, layers: str | Sequence[int]) -> Counts:
    """Return the chosen layers of counts `[..., L, E]`, as a view where that is possible."""
    chosen = select_layers(layers, counts_DLE.shape[-2])
    if chosen == list(range(counts_DLE.shape[-2])):
        return counts_DLE
    return counts_DLE[..., slice(chosen[0], chosen[0] + 1) if len(chosen) == 1 else chosen, :]


def gate_load(counts_DLE: Counts, layers: str | Sequence[int], *, by_layer: bool = False) -> Floats:
    """Turn token counts into loads of the chosen layers: O_i / sum(O_i), Zhu et al. (2025), section 3.

    The chosen layers of a source are divided by their sum; with `by_layer` each by its own. A source
    without tokens, or with a negative, NaN or infinite count, is refused.
    """
    if counts_DLE.ndim != 3:
        raise ValueError(f"counts have shape {counts_DLE.shape}; give [sources, layers, experts]")
    load_DLE: Floats = np.ascontiguousarray(at_layers(counts_DLE, layers), np.float64)
    grouped_DGE = load_DLE if by_layer else load_DLE.reshape(len(load_DLE), 1, -1)
    total_DG = grouped_DGE.sum(axis=2)
    if not (np.isfinite(total_DG).all() and total_DG.all() and load_DLE.min() >= 0):
        _refuse(grouped_DGE)
    return np.asarray(load_DLE / total_DG[:, :, None])


def _refuse(load_DGE: Floats) -> NoReturn:
    """Name the first source whose counts are no load."""
    for dataset_id, load_GE in enumerate(load_DGE):
        if not np.isfinite(load_GE).all() or (load_GE < 0).any():
            raise SourceError(
                [dataset_id],
                f"has a negative, NaN or infinite expert load: {load_GE.tolist()}; loads are token counts",
            )
        if not load_GE.any(axis=1).all():
            raise SourceError([dataset_id], "has no routed tokens; measure it on some rows")
    raise ValueError("the counts of a source are too large to be added")


PUBLISHED_EXPERTS = 8
"""Experts per layer of the model for which the published step size was chosen."""
CLOSE = 0.1
"""Squared distance, relative to the squared lengths, below which rounding would show in a product form."""


def l2_distance(load_DLE: Floats) -> Floats:
    """Return distance_DD, delta_ij = ||O_i - O_j||_2, Zhu et al. (2025), section 3.

    Like every distance here it is symmetric, with a diagonal of exactly 0, and refuses NaN and infinity.
    """
    load_DV = load_DLE.reshape(len(load_DLE), -1)
    # All pairs by one matrix product, about their mean: |a - b|^2 = |a|^2 + |b|^2 - 2 ab. Where that would
    # cancel digits the pair is taken again by its difference.
    centered_DV = load_DV - load_DV.mean(axis=0)
    product_DD = centered_DV @ centered_DV.T
    _check_finite(product_DD)
    lengths_DD = product_DD.diagonal()[:, None] + product_DD.diagonal()
    squared_DD = np.triu(lengths_DD - 2 * product_DD, k=1)
    for i, j in np.argwhere(np.triu(squared_DD <= CLOSE * lengths_DD, k=1)):
        difference_V = load_DV[i] - load_DV[j]
        squared_DD[i, j] = difference_V @ difference_V
    distance_DD = np.sqrt(squared_DD)
    return np.asarray(distance_DD + distance_DD.T)


def l2_scale(load_DLE: Floats) -> float:
    """Return the factor that makes l2 distances comparable over numbers of experts.

    Let the load of an expert be (1 + u) / n, n experts in all. Then ||O_i - O_j||_2 is
    sqrt(sum (u_i - u_j)^2) / n = rms(u_i - u_j) / sqrt(n): for the same relative deviations from an even
    load, l2 falls like 1 / sqrt(n). sqrt(n) undoes that, and dividing by sqrt(8) leaves l2 as it is for the 8
    experts of one layer, for which the published step size was chosen.
    """
    return math.sqrt(load_DLE[0].size / PUBLISHED_EXPERTS)


def cosine_distance(load_DLE: Floats) -> Floats:
    """Return one minus the cosine similarity of every two loads, none of which may be all zeros."""
    load_DV = load_DLE.reshape(len(load_DLE), -1)
    length_D = np.linalg.norm(load_DV, axis=1)
    if (length_D == 0).any():
        raise SourceError([int(np.argmin(length_D))], "has a load of zeros: no direction")
    # For unit vectors 1 - cos = |u - v|^2 / 2. This form gives 0 for equal loads and keeps the digits
    # of close ones, which 1 - u.v loses.
    return l2_distance(load_DV / length_D[:, None]) ** 2 / 2


def _row_by_row(load_DLE: Floats, distance: Callable[[Floats, Floats], Floats]) -> Floats:
    """Compare one load with those after it. All pairs at once would take D * D * V floats."""
    _check_finite(load_DLE)
    load_DV = load_DLE.reshape(len(load_DLE), -1)
    distance_DD = np.zeros((len(load_DV), len(load_DV)))
    for i in range(len(load_DV) - 1):
        distance_DD[i, i + 1 :] = distance(load_DV[i], load_DV[i + 1 :])
    return distance_DD + distance_DD.T


def _check_finite(values: Floats) -> None:
    if not np.isfinite(values).all():
        raise ValueError("loads must be finite; a source has a NaN or infinite one")


def _js_divergence(p_V: Floats, q_DV: Floats) -> Floats:
    # With x = (p - q) / (p + q), p log(p / m) = m (1 + x) log(1 + x), and q the same with -x. For close loads
    # this keeps digits that entropies would lose, and it is 0 for equal ones.
    sum_DV = p_V + q_DV
    x_DV = _quotient(p_V - q_DV, sum_DV)
    terms_DV = _xlog(1 + x_DV, x_DV) + _xlog(1 - x_DV, -x_DV)
    return np.asarray(np.maximum((sum_DV * terms_DV).sum(axis=-1) / 4, 0.0))


def _xlog(factor: Floats, x: Floats) -> Floats:
    """Return ``factor * log(1 + x)``, 0 where the factor is 0."""
    return factor * np.log1p(x, out=np.zeros_like(x), where=factor > 0)


def _quotient(numerator: Floats, divisor: Floats) -> Floats:
    """Divide, giving 0 where the divisor is 0."""
    return np.asarray(np.divide(numerator, divisor, out=np.zeros_like(numerator), where=divisor > 0))


DISTANCES: dict[str, Callable[[Floats], Floats]] = {
    "l2": l2_distance,
    "scaled-l2": lambda load_DLE: l2_distance(load_DLE) * l2_scale(load_DLE),
    "cos": cosine_distance,
    # ||sqrt(O_i) - sqrt(O_j)||_2 / sqrt(2), from 0 to 1 (no expert in common)
    "hellinger": lambda load_DLE: l2_distance(np.sqrt(load_DLE)) / math.sqrt(2),
    # The square root of the Jensen-Shannon divergence in nats, from 0 to sqrt(log 2): with m = (p + q) / 2,
    # JS = (KL(p || m) + KL(q || m)) / 2 (Lin 1991; Endres and Schindelin 2003 for its root being a metric).
    "js": lambda load_DLE: _row_by_row(load_DLE, lambda p_V, q_DV: np.sqrt(_js_divergence(p_V, q_DV))),
    # sum |O_i - O_j| / 2, the share of choices that would have to move, from 0 to 1
    "tv": lambda load_DLE: _row_by_row(load_DLE, lambda p_V, q_DV: np.abs(q_DV - p_V).sum(axis=1) / 2),
}


def gradient(metric: str, load_DLE: Floats, source: int) -> Floats:
    """Return how the distances of one source's load p to all loads q_j change with p.

    0 where it does not exist: for equal loads, and for experts that the source leaves idle.
    """
    q_DV = load_DLE.reshape(len(load_DLE), -1)
    p_V = q_DV[source]
    difference_DV = p_V - q_DV
    match metric:
        case "l2":
            gradient_DV = _unit(difference_DV)
        case "scaled-l2":
            gradient_DV = _unit(difference_DV) * l2_scale(load_DLE)
        case "cos":
            length = np.linalg.norm(p_V)
            p_V, q_DV = p_V / length, q_DV / np.linalg.norm(q_DV, axis=1, keepdims=True)
            gradient_DV = ((q_DV @ p_V)[:, None] * p_V - q_DV) / length
        case "hellinger":
            root_V = np.sqrt(p_V)
            steep_V = np.divide(1, 2 * root_V, out=np.zeros_like(p_V), where=p_V > 0)
            gradient_DV = _unit(root_V - np.sqrt(q_DV)) * steep_V / math.sqrt(2)
        case "js":
            distance_D1 = np.sqrt(_js_divergence(p_V, q_DV))[:, None]
            x_DV = np.divide(difference_DV, p_V + q_DV, out=np.zeros_like(q_DV), where=p_V > 0)
            gradient_DV = _quotient(np.log1p(x_DV), 4 * distance_D1)
        case "tv":
            gradient_DV = np.sign(difference_DV) / 2
        case _:
            raise AssertionError(f"metric {metric} has no gradient")
    return gradient_DV.reshape(load_DLE.shape)


def _unit(vector_DV: Floats) -> Floats:
    return _quotient(vector_DV, np.linalg.norm(vector_DV, axis=1, keepdims=True))


REFERENCE_GAP = 1 / 64
"""Gap between scores after normalization: the published rule's, with 4 sources and 8 experts, are of this
size, so that the published step size stays what it is."""
NO_GAP = 1e-9
"""Gaps below this part of the scores are rounding: they are not blown up, and such scores are equal."""
AGGREGATES: dict[str, Callable[[Floats], Floats]] = {
    "mean": lambda distance_DD: distance_DD.mean(axis=1),
    "max": lambda distance_DD: distance_DD.max(axis=1),
    "min": lambda distance_DD: distance_DD.min(axis=1),
    "others-mean": lambda distance_DD: distance_DD.sum(axis=1) / (len(distance_DD) - 1),
    "others-min": lambda distance_DD: _without_self(distance_DD).min(axis=1),
}


def source_delta(distance_DD: Floats, aggregate: str) -> Floats:
    """Score each source: larger means further from the others, hence less redundant.

    ``"mean"`` is Delta_i = sum_j delta_ij / D of Zhu et al. (2025), section 3: divided by D, though only
    D - 1 terms can be positive. ``"max"`` and ``"min"`` are the official code's other two: the furthest
    source, and the nearest with the source itself among them, so always 0 (of cosines its ``min`` is that of
    similarities, see `GateLoad`). ``"others-mean"`` and ``"others-min"`` leave the source itself out and need
    at least two.
    """
    square = distance_DD.ndim == 2 and len(distance_DD) == distance_DD.shape[1]
    if not square or not np.isfinite(distance_DD).all():
        raise ValueError(f"distances of shape {distance_DD.shape} must be [sources, sources] and finite")
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate {aggregate!r} is unknown; give one of {tuple(AGGREGATES)}")
    return AGGREGATES[aggregate](distance_DD)


def delta_shares(distance_DD: Floats, aggregate: str) -> Floats:
    """Return how much of each distance is in each score of `source_delta`: d delta_i / d distance_ij.

    For a furthest or nearest source that is 1, even where two are equally far.
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


def gap_scale(delta_D: Floats) -> float:
    """Return the factor that brings the gaps between scores to `REFERENCE_GAP`; 1 where they are rounding.

    Only the gaps delta_i - mean(delta) move weights, and their size depends on what is no property of the
    sources. For n experts l2 falls like 1 / sqrt(n), see `l2_scale`, and the gaps between sources that
    differ at random by another 1 / sqrt(n), as |u_i - u_j|^2 comes closer to its mean. A mean over D with the
    source itself adds (D - 1) / D. No formula in D and n fits all of that, so the size that is expected of a
    gap is taken from the scores themselves: their standard deviation over the sources.

    A step is then the same in size however alike the sources are; noise must be kept out by other means.
    """
    spread = float(delta_D.std())
    return REFERENCE_GAP / spread if spread > NO_GAP * float(np.abs(delta_D).max()) else 1.0


def _without_self(distance_DD: Floats) -> Floats:
    return np.where(np.eye(len(distance_DD), dtype=bool), np.inf, distance_DD)
