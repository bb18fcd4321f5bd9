"""The paper's strategy: sources that load the experts differently from the rest gain weight.

Axes: H = 2 halves, D sources, L chosen layers, E experts, G groups of layers that are compared as one.

The paper's rule with sentence embeddings in place of gate loads, applied once.

Axes: D sources, V dimensions of an embedding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.distance import (
    AGGREGATES,
    DISTANCES,
    cosine_distance,
    delta_shares,
    gap_scale,
    l2_distance,
    l2_scale,
    source_delta,
)
from megatron_dynmix.mixing.gate_loads import at_layers, check_layers, gate_load
from megatron_dynmix.mixing.noise import Noise, debiased_l2, delta_error, measure_noise, shrink_gaps
from megatron_dynmix.mixing.strategy import Counts, Proposal, Signal, SourceError
from megatron_dynmix.mixing.weights import check_step_size, reweight

MIN_SOURCES = 3
"""Fewest sources between which distances can tell a difference."""
LAYER_MIXES = ("concat", "mean")
NORMALISATIONS = ("none", "scale")


@dataclass(frozen=True, kw_only=True)
class GateLoad:
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

    name: ClassVar[str] = "gate-load"
    needs_gate_load: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

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
    def needs_halves(self) -> bool:
        """Whether `Signal.half_counts_HDLE` must be measured."""
        return self.debias or self.min_gap > 0

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Counts -> loads -> distances -> deltas -> weights.

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
        """Loads that are compared as one: each layer for itself, or all together."""
        if self.layer_mix == "mean":
            return [load_DLE[:, layer : layer + 1] for layer in range(load_DLE.shape[1])]
        return [load_DLE]

    def _noises(self, load_DLE: NDArray[np.float64], half_counts_HDLE: Counts | None) -> list[Noise] | None:
        """Noise of each group of layers; None where it is not known, and not needed."""
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
        totals_HDG = total_HDL if self.layer_mix == "mean" else total_HDL.sum(axis=2, keepdims=True)
        share_GD = (totals_HDG[0] / totals_HDG.sum(axis=0)).T
        return [
            measure_noise(load, first, share_D)
            for load, first, share_D in zip(*groups, share_GD, strict=True)
        ]

    def _scores(
        self, load_DLE: NDArray[np.float64], noises: Sequence[Noise] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
        """Distances, deltas and, where the noise is known, their errors."""
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
        """Scores and errors as the weights are to follow them; for those who would turn them round."""
        return delta_D, error_D


@dataclass(frozen=True, kw_only=True)
class Inverse(GateLoad):
    """The control of the paper's hypothesis: the most redundant source gains, the least redundant loses.

    The deltas of `GateLoad` change places by rank, the largest with the smallest and so on: the official
    code's ``~l2``, Zhu et al. (2025), section 4. The same steps are made, by the wrong sources. Equal deltas
    share the mean of what they would get, so that it does not matter which of them comes first.
    """

    name: ClassVar[str] = "inverse"

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


EMBEDDING_DISTANCES = {"l2": l2_distance, "cos": cosine_distance}
"""Distances that mean something for vectors of any sign; the others of `DISTANCES` want shares."""


@dataclass(frozen=True, kw_only=True)
class SentenceEmbedding:
    """Static weights from one embedding per source, by one update of Zhu et al. (2025), Algorithm 1.

    The SentEmb baseline of section 4: mean distance to the other sources' embeddings, softmax of
    log w + eta times that, smoothed by c; then the weights stay. The embeddings are used as given; the paper
    does not name its encoder.

    Attributes:
        embeddings_DV: one vector per source, in the order of the sources; usually the mean over its examples.
        eta: step size >= 0.
        smoothing: c, the share spread evenly over the sources, from 0 to 1.
        metric: distance between embeddings: ``l2`` or ``cos``.

    Raises:
        ValueError: on construction, for embeddings that are no finite matrix, or an option out of range.

    """

    embeddings_DV: Sequence[Sequence[float]]
    eta: float = 10.0
    smoothing: float = 0.05
    metric: str = "l2"

    name: ClassVar[str] = "sent-emb"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = True
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_step_size(self.eta, self.smoothing)
        if self.metric not in EMBEDDING_DISTANCES:
            raise ValueError(
                f"metric {self.metric!r} cannot compare embeddings; give one of {sorted(EMBEDDING_DISTANCES)}"
            )
        try:
            vectors_DV = np.asarray(self.embeddings_DV, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError("the embeddings are not number vectors of one length, one per source") from None
        if vectors_DV.ndim != 2 or not np.isfinite(vectors_DV).all():
            raise ValueError(
                f"the embeddings have shape {vectors_DV.shape}; give one finite vector per source"
            )

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Embeddings -> distances -> deltas -> weights; to be asked once, for it starts and never updates.

        Raises:
            ValueError: embeddings of another number of sources.

        """
        if len(self.embeddings_DV) != len(weights_D):
            raise ValueError(
                f"{len(self.embeddings_DV)} embeddings for {len(weights_D)} sources; give one each"
            )
        distance_DD = EMBEDDING_DISTANCES[self.metric](np.asarray(self.embeddings_DV, dtype=np.float64))
        delta_D = source_delta(distance_DD, "mean")
        new_D = reweight(weights_D, delta_D, eta=self.eta, smoothing=self.smoothing)
        return Proposal(weights_D=new_D, delta_D=delta_D, distance_DD=distance_DD)
