"""Strategies on gate loads: the paper's, which favors sources that load the experts unlike the rest, and kin.

Noise: loads are off because they were measured on few tokens, which two halves of those tell.
The even and the odd rows of source i give two loads a_i, b_i, independent and with the same mean; the load
is their mean by tokens, o_i = f_i a_i + (1 - f_i) b_i. If one token had covariance S_i, rows drawn
independently, a_i would have S_i / n_a, b_i S_i / n_b and o_i S_i / (n_a + n_b), so

    Cov(o_i) = f_i (1 - f_i) Cov(a_i - b_i),    with f_i (1 - f_i) = n_a n_b / (n_a + n_b)^2.

S_i need not be known, nor what the tokens of a row have in common: rows, not tokens, are what is drawn. From
one difference d_i = a_i - b_i two numbers are estimated per source:

- the energy V_i = f_i (1 - f_i) |d_i|^2, whose mean is the expected squared error tr Cov(o_i);
- the size s_i of a covariance of multinomial shape, s_i (diag(o) - o o^T / q) in each layer with its sum q.
  Since tr(diag(o)^-1 (diag(o) - o o^T / q)) = m - 1 for m experts in use,
  s_i = f_i (1 - f_i) sum_e d_ie^2 / o_ie / sum_layers (m - 1). (For independent choices s_i n_i is about 1,
  and more if neighboring tokens go the same way: a design effect.)

The second is needed for errors of scores, which depend on the noise in one direction of E; one difference
alone would be a wild guess there. What it leaves out is any covariance between layers.

Axes: H = 2 halves, D sources, L chosen layers, E experts, G groups of layers that are compared as one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dynmix.mixing.gate_loads import (
    AGGREGATES,
    DISTANCES,
    NO_GAP,
    at_layers,
    check_layers,
    delta_shares,
    gap_scale,
    gate_load,
    gradient,
    l2_scale,
    source_delta,
)
from megatron_dynmix.mixing.strategy import Counts, Proposal, Signal, SourceError, Strategy
from megatron_dynmix.mixing.weights import Floats, balancing_weights, check_step_size, reweight

MIN_SOURCES = 3
"""Fewest sources between which distances can tell a difference."""
LAYER_MIXES = ("concat", "mean")
NORMALISATIONS = ("none", "scale")


@dataclass(frozen=True, kw_only=True)
class GateLoad(Strategy):
    """Dynamic mixing by gate load: Zhu et al. (2025), Algorithm 1. The defaults are what they published.

    Attributes:
        eta: step size >= 0.
        smoothing: c, the share spread evenly over the sources, from 0 to 1.
        metric: distance between loads: ``l2``, ``scaled-l2``, ``cos``, ``hellinger``, ``js`` or ``tv``.
        aggregate: what of a source's distances is its delta: ``mean``, ``max`` or ``min`` over all sources,
            itself included, ``others-mean`` or ``others-min`` over the others. With ``cos``, ``min`` is one
            minus the least similarity, as in the official code: the largest distance.
        layers: MoE layers whose loads count: ``last``, ``all``, or a list of them, counted from 0.
        layer_mix: with several layers, ``"concat"`` compares all their experts as one load, ``"mean"``
            averages the distances found in each layer.
        debias: take what sampling noise adds to l2 distances off them.
        min_gap: act only on what exceeds so many standard errors of a delta.
        normalise: ``scale`` brings the gaps between the deltas to one size, ``none`` leaves them.

    """

    eta: float = 10.0
    smoothing: float = 0.05
    metric: str = "l2"
    aggregate: str = "mean"
    layers: str | Sequence[int] = "last"
    layer_mix: str = "concat"
    debias: bool = False
    min_gap: float = 0.0
    normalise: str = "none"

    name = "gate-load"
    needs_gate_load = True

    def __post_init__(self) -> None:
        check_step_size(self.eta, self.smoothing)
        if self.aggregate == "others-max":
            raise ValueError("aggregate 'others-max' is the same as max; give max")
        for option, value, allowed in (
            ("metric", self.metric, tuple(DISTANCES)),
            ("aggregate", self.aggregate, tuple(AGGREGATES)),
            ("layer_mix", self.layer_mix, LAYER_MIXES),
            ("normalise", self.normalise, NORMALISATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{option} {value!r} is unknown; give one of {', '.join(allowed)}")
        check_layers(self.layers)
        if self.debias and self.metric not in ("l2", "scaled-l2"):
            raise ValueError(f"debias works on l2 distances, metric is {self.metric}; give l2 or scaled-l2")
        if not (math.isfinite(self.min_gap) and self.min_gap >= 0):
            raise ValueError(
                f"min_gap {self.min_gap} is not a number of standard errors; give one >= 0 (2 is usual)"
            )

    @property
    def needs_halves(self) -> bool:  # type: ignore[override]
        """Whether `Signal.half_counts_HDLE` must be measured."""
        return self.debias or self.min_gap > 0

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Turn counts into loads, distances, deltas and weights.

        With halves of the counts in the signal the proposal has errors of the deltas, needed or not.
        """
        num_sources = len(weights_D)
        if num_sources < MIN_SOURCES:
            raise ValueError(
                f"{self.name} mixing needs at least {MIN_SOURCES} sources, got {num_sources}: two sources "
                "are always equally far from each other, so their weights would never change; add a source "
                "or keep the weights fixed"
            )
        if signal.counts_DLE is None:
            raise ValueError(f"{self.name} mixing needs token counts per expert; the signal holds none")
        if len(signal.counts_DLE) != num_sources:
            raise ValueError(f"counts for {len(signal.counts_DLE)} sources, weights for {num_sources}")
        if self.needs_halves and signal.half_counts_HDLE is None:
            raise ValueError(
                f"{self.name} mixing with debias or min_gap needs the counts in two halves; there are none"
            )
        load_DLE = self._loads(signal.counts_DLE)
        noises = self._noises(load_DLE, signal.half_counts_HDLE)
        distance_DD, delta_D, error_D = self._scores(load_DLE, noises)
        if self.normalise == "scale":
            scale = gap_scale(delta_D)
            delta_D, error_D = delta_D * scale, None if error_D is None else error_D * scale
        if error_D is not None:
            delta_D = shrink_gaps(delta_D, error_D, self.min_gap)
        delta_D, error_D = self._directed(delta_D, error_D)
        return Proposal(
            weights_D=reweight(weights_D, delta_D, eta=self.eta, smoothing=self.smoothing),
            delta_D=delta_D,
            load_DLE=load_DLE,
            distance_DD=distance_DD,
            delta_error_D=error_D,
        )

    @property
    def _aggregate(self) -> str:
        """Return what is taken of the distances; for ``cos`` the official code takes it of similarities."""
        return "max" if (self.metric, self.aggregate) == ("cos", "min") else self.aggregate

    def _loads(self, counts_DLE: Counts) -> Floats:
        return gate_load(counts_DLE, self.layers, by_layer=self.layer_mix == "mean")

    def _groups(self, load_DLE: Floats) -> list[Floats]:
        """Split off what is compared as one: each layer for itself, or all together."""
        if self.layer_mix == "mean":
            return [load_DLE[:, layer : layer + 1] for layer in range(load_DLE.shape[1])]
        return [load_DLE]

    def _noises(self, load_DLE: Floats, half_counts_HDLE: Counts | None) -> "list[Noise] | None":
        """Measure the noise of each group of layers; None where it cannot be known, and is not needed."""
        if half_counts_HDLE is None:
            return None
        total_HDL = at_layers(half_counts_HDLE, self.layers).sum(axis=3)
        if not total_HDL.all():
            if self.needs_halves:
                raise SourceError(
                    np.flatnonzero((total_HDL == 0).any(axis=(0, 2))).tolist(),
                    f"must have tokens in both halves of the rows: how far they disagree tells {self.name} "
                    "mixing the noise; measure more rows",
                )
            return None
        groups = self._groups(load_DLE), self._groups(self._loads(half_counts_HDLE[0]))
        total_HDG = total_HDL if self.layer_mix == "mean" else total_HDL.sum(axis=2, keepdims=True)
        share_GD = (total_HDG[0] / total_HDG.sum(axis=0)).T
        return [
            measure_noise(load, first, share_D)
            for load, first, share_D in zip(*groups, share_GD, strict=True)
        ]

    def _scores(
        self, load_DLE: Floats, noises: "Sequence[Noise] | None"
    ) -> tuple[Floats, Floats, Floats | None]:
        """Return distances, deltas and, where the noise is known, their errors."""
        groups = self._groups(load_DLE)
        measured = [DISTANCES[self.metric](load) for load in groups]
        distances = measured
        if self.debias:
            assert noises is not None
            scale = l2_scale(groups[0]) if self.metric == "scaled-l2" else 1.0
            distances = [
                scale * debiased_l2(distance_DD / scale, noise)
                for distance_DD, noise in zip(measured, noises, strict=True)
            ]
        distance_DD = distances[0] if len(distances) == 1 else np.mean(distances, axis=0)
        delta_D = source_delta(distance_DD, self._aggregate)
        if noises is None:
            return distance_DD, delta_D, None
        share_DD = delta_shares(distance_DD, self._aggregate)
        # The same tokens were counted in every layer. The mean of the errors is right if those are wrong
        # alike, and too careful otherwise.
        errors = [
            delta_error(load, noise, self.metric, distance_DD, share_DD)
            for load, noise, distance_DD in zip(groups, noises, measured, strict=True)
        ]
        return distance_DD, delta_D, np.mean(errors, axis=0)

    def _directed(self, delta_D: Floats, error_D: Floats | None) -> tuple[Floats, Floats | None]:
        """Return scores and errors as the weights are to follow them."""
        return delta_D, error_D


@dataclass(frozen=True, kw_only=True)
class Inverse(GateLoad):
    """The control of the paper's hypothesis: the most redundant source gains, the least redundant loses.

    The deltas of `GateLoad` change places by rank, the largest with the smallest and so on: the official
    code's ``~l2``, Zhu et al. (2025), section 4. The same steps are made, by the wrong sources. Equal deltas
    share the mean of what they would get, so that it does not matter which of them comes first; those of
    copies of a source are equal to rounding only.
    """

    name = "inverse"

    def _directed(self, delta_D: Floats, error_D: Floats | None) -> tuple[Floats, Floats | None]:
        order_D = np.argsort(delta_D, kind="stable")
        apart_D = np.diff(delta_D[order_D], prepend=-np.inf) > NO_GAP * np.abs(delta_D).max()
        group_D = np.empty(len(delta_D), np.int64)
        group_D[order_D] = np.cumsum(apart_D) - 1

        def swapped(values_D: Floats) -> Floats:
            swapped_D = np.empty_like(values_D)
            swapped_D[order_D] = values_D[order_D[::-1]]
            return np.asarray((np.bincount(group_D, swapped_D) / np.bincount(group_D))[group_D])

        return swapped(delta_D), None if error_D is None else swapped(error_D)


@dataclass(frozen=True, kw_only=True)
class Balanced(Strategy):
    """The mix that is closest to all sources: min over w of sum_i (sum_j w_j delta_ij)^2.

    The Balanced baseline of Zhu et al. (2025), section 4.6.1, equation 4, which minimizes the squared sums of
    distances between loads over w without saying how the loads depend on w. This is the plain reading: each
    source's distance to the mix is the weighted mean of its distances to the others. It is a quadratic
    problem over the simplex, solved exactly where the paper used SGD; equally distant sources get equal
    weights, outliers little or none. Nothing is accumulated. The paper computed it once and kept it.

    Attributes:
        metric: distance between loads: ``l2``, ``scaled-l2``, ``cos``, ``hellinger``, ``js`` or ``tv``.
        layers: MoE layers whose loads count: ``last``, ``all``, or a list of them, counted from 0.

    """

    metric: str = "l2"
    layers: str | Sequence[int] = "last"

    name = "balanced"
    needs_gate_load = True

    def __post_init__(self) -> None:
        if self.metric not in DISTANCES:
            raise ValueError(f"metric {self.metric!r} is unknown; give one of {sorted(DISTANCES)}")
        check_layers(self.layers)

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Turn counts into loads, distances and weights; the current weights are not read."""
        if signal.counts_DLE is None or len(signal.counts_DLE) != len(weights_D):
            raise ValueError(f"balanced mixing needs token counts per expert of {len(weights_D)} sources")
        load_DLE = gate_load(signal.counts_DLE, self.layers)
        distance_DD = DISTANCES[self.metric](load_DLE)
        return Proposal(
            weights_D=balancing_weights(distance_DD),
            delta_D=np.zeros(len(weights_D)),
            load_DLE=load_DLE,
            distance_DD=distance_DD,
        )


@dataclass(frozen=True, eq=False)
class Noise:
    """What the halves tell about the sampling error of loads: V and s of the top of this file."""

    energy_D: Floats
    size_D: Floats


def measure_noise(load_DLE: Floats, first_DLE: Floats, share_D: Floats) -> Noise:
    """Estimate the noise of each load o from the load a of its first half, normalized alike.

    f = `share_D` of a source's counts is in that half, above 0 and below 1. Since o = f a + (1 - f) b, it is
    enough: a - b = (a - o) / (1 - f).
    """
    weight_D = share_D / (1 - share_D)
    squared_DLE = first_DLE - load_DLE
    squared_DLE *= squared_DLE
    energy_D = weight_D * squared_DLE.sum(axis=(1, 2))
    freedom_D = np.count_nonzero(load_DLE, axis=(1, 2)) - load_DLE.shape[1]
    # Where no token of either half went, the difference is 0 and stays it.
    squared_DLE /= np.maximum(load_DLE, np.finfo(np.float64).tiny)
    return Noise(energy_D, weight_D * squared_DLE.sum(axis=(1, 2)) / np.maximum(freedom_D, 1))


def debiased_l2(distance_DD: Floats, noise: Noise) -> Floats:
    """Return l2 distances of measured loads without what sampling noise adds to them.

    Independent errors e_i, e_j give E |o_i - o_j + e_i - e_j|^2 = |o_i - o_j|^2 + V_i + V_j: noise makes
    sources look further apart, those with few tokens most. V_i + V_j is taken off, down to 0. For halves of
    equal size this is the mean of (a_i - a_j)(b_i - b_j) and (a_i - b_j)(b_i - a_j), products of two
    independent measurements of one difference.
    """
    squared_DD = distance_DD**2 - noise.energy_D[:, None] - noise.energy_D
    np.fill_diagonal(squared_DD, 0.0)
    return np.sqrt(np.maximum(squared_DD, 0.0))


def delta_error(load_DLE: Floats, noise: Noise, metric: str, distance_DD: Floats, share_DD: Floats) -> Floats:
    """Return one standard error of each score, to first order in the noise.

    delta_i = sum_j w_ij distance(o_i, o_j) depends on its own load through G_i = sum_j w_ij g_ij and on
    another's through w_ij g_ji, g_ij being the gradient of distance(o_i, o_j) in o_i. The errors of different
    sources are independent, so with Var_k(g) = sum_e o_ke g_e^2 - sum_layers (sum_e o_ke g_e)^2 / q

        Var(delta_i) = s_i Var_i(G_i) + sum_j w_ij^2 s_j Var_j(g_ji).

    First order: it holds where sources are further apart than their noise; nearer, the error is less.
    `distance_DD` are not debiased; `share_DD` is w, see `delta_shares`, its diagonal ignored.
    """
    share_DD = np.where(np.eye(len(share_DD), dtype=bool), 0.0, share_DD)
    factor = l2_scale(load_DLE) if metric == "scaled-l2" else 1.0
    if metric in ("l2", "scaled-l2"):
        own_D, other_DD = _l2_variances(load_DLE, distance_DD / factor, share_DD)
    else:
        own_D, other_DD = _variances(load_DLE, share_DD, metric)
    variance_D = noise.size_D * own_D + (share_DD**2 * other_DD.T) @ noise.size_D
    return np.asarray(factor * np.sqrt(variance_D))


def _variances(load_DLE: Floats, share_DD: Floats, metric: str) -> tuple[Floats, Floats]:
    """Return Var_i(G_i), and Var_i(g_ij) for all pairs, by the gradient of any metric; source by source."""
    total_DLE, pair_DD = np.zeros_like(load_DLE), np.zeros_like(share_DD)
    for i in range(len(load_DLE)):
        gradient_DLE = gradient(metric, load_DLE, i)
        pair_DD[i] = _variance(gradient_DLE, load_DLE[i : i + 1])
        total_DLE[i] = (share_DD[i] @ gradient_DLE.reshape(len(load_DLE), -1)).reshape(load_DLE.shape[1:])
    return _variance(total_DLE, load_DLE), pair_DD


def _variance(gradient_DLE: Floats, load_DLE: Floats) -> Floats:
    """Return Var_d(g_d) of every row; a single load serves all rows."""
    weighted_DLE = gradient_DLE * load_DLE
    mean_D = (weighted_DLE.sum(axis=2) ** 2 / load_DLE.sum(axis=2)).sum(axis=1)
    weighted_DLE *= gradient_DLE
    return np.asarray(np.maximum(weighted_DLE.sum(axis=(1, 2)) - mean_D, 0.0))


def _l2_variances(load_DLE: Floats, distance_DD: Floats, share_DD: Floats) -> tuple[Floats, Floats]:
    """Return the same for l2, whose gradient (o_i - o_j) / distance turns the sums into matrix products."""
    load_DV = load_DLE.reshape(len(load_DLE), -1)
    inverse_DD = np.divide(1, distance_DD, out=np.zeros_like(distance_DD), where=distance_DD > 0)
    cross_DD = (load_DV * load_DV) @ load_DV.T
    square_DD = cross_DD.diagonal()[:, None] - 2 * cross_DD + cross_DD.T
    load_LDE = load_DLE.swapaxes(0, 1)
    gram_LDD = load_LDE @ load_LDE.swapaxes(1, 2)
    inner_LDD = gram_LDD.diagonal(axis1=1, axis2=2)[:, :, None] - gram_LDD
    mean_DD = (inner_LDD**2 / load_LDE.sum(axis=2)[:, :, None]).sum(axis=0)
    pair_DD = np.maximum(square_DD - mean_DD, 0.0) * inverse_DD**2
    reach_DD = np.diag((share_DD * inverse_DD).sum(axis=1)) - share_DD * inverse_DD
    return _variance((reach_DD @ load_DV).reshape(load_DLE.shape), load_DLE), pair_DD


def shrink_gaps(delta_D: Floats, error_D: Floats, min_gap: float) -> Floats:
    """Return scores that differ from their mean only by what noise does not explain.

    gap_i = delta_i - mean(delta) is made smaller by ``min_gap`` standard errors, to 0 where it is less than
    that: continuous, so that a gap does not jump in and out of sight from update to update.
    """
    if min_gap == 0:
        return delta_D
    mean = delta_D.mean()
    gap_D = delta_D - mean
    return np.asarray(mean + np.sign(gap_D) * np.maximum(np.abs(gap_D) - min_gap * error_D, 0.0))
