"""Strategies on gate loads: the paper's, which favors sources that load the experts unlike the rest, and kin.

Axes: H = 2 halves, D sources, L chosen layers, E experts, G groups of layers that are compared as one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.gate_loads import (
    AGGREGATES,
    DISTANCES,
    at_layers,
    check_layers,
    delta_shares,
    gap_scale,
    gate_load,
    l2_scale,
    source_delta,
)
from megatron_dynmix.mixing.noise import Noise, debiased_l2, delta_error, measure_noise, shrink_gaps
from megatron_dynmix.mixing.strategy import Counts, Proposal, Signal, SourceError, Strategy
from megatron_dynmix.mixing.weights import check_step_size, reweight

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
            itself included, ``others-mean`` or ``others-min`` over the others.
        layers: MoE layers whose loads count: ``last``, ``all``, or a list of them, counted from 0.
        layer_mix: with several layers, ``"concat"`` compares all their experts as one load, ``"mean"``
            averages the distances found in each layer.
        debias: take what sampling noise adds to l2 distances off them.
        min_gap: act only on what exceeds so many standard errors of a delta.
        normalise: ``scale`` brings the gaps between the deltas to one size, ``none`` leaves them.

    Raises:
        ValueError: on construction, for a value out of range, or `debias` with another metric than l2.

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
            ("aggregate", self.aggregate, AGGREGATES),
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

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Turn counts into loads, distances, deltas and weights.

        With halves of the counts in the signal the proposal has errors of the deltas, needed or not.

        Raises:
            ValueError: no counts, fewer than three sources, counts that `gate_load` refuses, or halves that
                are needed and are missing.

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

    def _loads(self, counts_DLE: Counts) -> NDArray[np.float64]:
        return gate_load(counts_DLE, self.layers, by_layer=self.layer_mix == "mean")

    def _groups(self, load_DLE: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Split off what is compared as one: each layer for itself, or all together."""
        if self.layer_mix == "mean":
            return [load_DLE[:, layer : layer + 1] for layer in range(load_DLE.shape[1])]
        return [load_DLE]

    def _noises(self, load_DLE: NDArray[np.float64], half_counts_HDLE: Counts | None) -> list[Noise] | None:
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
        self, load_DLE: NDArray[np.float64], noises: Sequence[Noise] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
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
        delta_D = source_delta(distance_DD, self.aggregate)
        if noises is None:
            return distance_DD, delta_D, None
        share_DD = delta_shares(distance_DD, self.aggregate)
        # The same tokens were counted in every layer. The mean of the errors is right if those are wrong
        # alike, and too careful otherwise.
        errors = [
            delta_error(load, noise, self.metric, distance_DD, share_DD)
            for load, noise, distance_DD in zip(groups, noises, measured, strict=True)
        ]
        return distance_DD, delta_D, np.mean(errors, axis=0)

    def _directed(
        self, delta_D: NDArray[np.float64], error_D: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return scores and errors as the weights are to follow them."""
        return delta_D, error_D


@dataclass(frozen=True, kw_only=True)
class Inverse(GateLoad):
    """The control of the paper's hypothesis: the most redundant source gains, the least redundant loses.

    The deltas of `GateLoad` change places by rank, the largest with the smallest and so on: the official
    code's ``~l2``, Zhu et al. (2025), section 4. The same steps are made, by the wrong sources. Equal deltas
    share the mean of what they would get, so that it does not matter which of them comes first.
    """

    name = "inverse"

    def _directed(
        self, delta_D: NDArray[np.float64], error_D: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        order_D = np.argsort(delta_D, kind="stable")
        _, group_D = np.unique(delta_D, return_inverse=True)

        def swapped(values_D: NDArray[np.float64]) -> NDArray[np.float64]:
            swapped_D = np.empty_like(values_D)
            swapped_D[order_D] = values_D[order_D[::-1]]
            return np.asarray((np.bincount(group_D, swapped_D) / np.bincount(group_D))[group_D])

        return swapped(delta_D), None if error_D is None else swapped(error_D)


RIDGE = 1e-8
"""Added to the diagonal, relative to its mean: of several solutions (equal sources) it picks the even one."""
ROUNDING = 1e-12
"""Gain that counts as none; below what the ridge makes of two equal sources."""


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

    Raises:
        ValueError: on construction, for another metric or layers.

    """

    metric: str = "l2"
    layers: str | Sequence[int] = "last"

    name = "balanced"
    needs_gate_load = True

    def __post_init__(self) -> None:
        if self.metric not in DISTANCES:
            raise ValueError(f"metric {self.metric!r} is unknown; give one of {sorted(DISTANCES)}")
        check_layers(self.layers)

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Turn counts into loads, distances and weights; the current weights are not read.

        Raises:
            ValueError: no counts, counts of another number of sources, or counts that `gate_load` refuses.

        """
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


def balancing_weights(distance_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the shares w that minimize ||distance_DD w||; uniform if all distances are 0.

    Scaling w scales the objective, so with Q = distance^T distance the shares are those of the minimizer of
    u'Qu / 2 - sum u over u >= 0, found by an active set (Lawson & Hanson, 1974, chapter 23).
    """
    num_sources = len(distance_DD)
    largest = distance_DD.max()
    if largest == 0:
        return np.full(num_sources, 1 / num_sources)
    scaled_DD = distance_DD / largest
    quadratic_DD = scaled_DD.T @ scaled_DD
    quadratic_DD += RIDGE * quadratic_DD.trace() / num_sources * np.eye(num_sources)
    used = np.zeros(num_sources, dtype=bool)
    solution_D = np.zeros(num_sources)
    while not used.all():
        gain_D = np.where(used, -np.inf, 1 - quadratic_DD @ solution_D)
        entering = int(np.argmax(gain_D))
        if gain_D[entering] <= ROUNDING:
            break
        used[entering] = True
        solution_D = _step(quadratic_DD, solution_D, used)
        if not used[entering]:  # its gain was rounding, for it left at once; it would enter again for ever
            break
    return np.asarray(solution_D / solution_D.sum())


def _step(
    quadratic_DD: NDArray[np.float64], solution_D: NDArray[np.float64], used: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Minimize over the used sources; drop (from ``used`` too) those that would become negative."""
    while True:
        wanted_D = np.zeros_like(solution_D)
        wanted_D[used] = np.linalg.solve(quadratic_DD[np.ix_(used, used)], np.ones(int(used.sum())))
        negative = used & (wanted_D <= 0)
        if not negative.any():
            return wanted_D
        # As far towards the wanted point as all stay >= 0; the source that stops it leaves.
        room_D = np.where(negative, solution_D / np.where(negative, solution_D - wanted_D, 1), np.inf)
        stopping = int(np.argmin(room_D))
        solution_D = solution_D + room_D[stopping] * (wanted_D - solution_D)
        solution_D[stopping] = 0
        used[stopping] = False
