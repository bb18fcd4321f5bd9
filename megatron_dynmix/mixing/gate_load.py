"""The paper's strategy: sources that load the experts differently from the rest gain weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .distance import AGGREGATES, DISTANCES, source_delta
from .load import check_layers, gate_load
from .strategy import Proposal, Signal
from .update import check_step_size, reweight

MIN_SOURCES = 3
"""Fewest sources between which distances can tell a difference."""


@dataclass(frozen=True, kw_only=True)
class GateLoad:
    """Dynamic mixing by gate load: Zhu et al. (2025), Algorithm 1.

    Attributes:
        eta: step size >= 0.
        smoothing: c, the share spread evenly over the sources, from 0 to 1.
        metric: distance between loads, a key of `DISTANCES`.
        aggregate: how a source's distances become its delta, see `source_delta`.
        layers: MoE layers whose loads count, see `select_layers`.

    Raises:
        ValueError: on construction, for a value out of range.

    """

    eta: float = 10.0
    smoothing: float = 0.05
    metric: str = "l2"
    aggregate: str = "mean"
    layers: str | Sequence[int] = "last"

    name: ClassVar[str] = "gate-load"
    needs_gate_load: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_step_size(self.eta, self.smoothing)
        if self.metric not in DISTANCES:
            raise ValueError(f"metric {self.metric!r} is unknown; give one of {sorted(DISTANCES)}")
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate {self.aggregate!r} is unknown; give one of {AGGREGATES}")
        check_layers(self.layers)

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Counts -> loads -> distances -> deltas -> weights.

        Raises:
            ValueError: no counts, fewer than three sources, or counts that `gate_load` refuses.

        """
        num_sources = len(weights_D)
        if num_sources < MIN_SOURCES:
            raise ValueError(
                f"gate-load mixing needs at least {MIN_SOURCES} sources, got {num_sources}: two sources are "
                "always equally far from each other, so their weights would never change; add a source or "
                "keep the weights fixed"
            )
        if signal.counts_DLE is None:
            raise ValueError("gate-load mixing needs token counts per expert; the signal holds none")
        if len(signal.counts_DLE) != num_sources:
            raise ValueError(f"counts for {len(signal.counts_DLE)} sources, weights for {num_sources}")
        return self.from_load(weights_D, gate_load(signal.counts_DLE, self.layers))

    def from_load(self, weights_D: NDArray[np.float64], load_DE: NDArray[np.float64]) -> Proposal:
        """Loads of the chosen layers -> distances -> deltas -> weights: `propose` past the counts."""
        distance_DD = DISTANCES[self.metric](load_DE)
        delta_D = source_delta(distance_DD, self.aggregate)
        new_D = reweight(weights_D, delta_D, eta=self.eta, smoothing=self.smoothing)
        return Proposal(weights_D=new_D, delta_D=delta_D, load_DE=load_DE, distance_DD=distance_DD)
