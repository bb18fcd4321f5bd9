"""Controls: rules whose verdict on each source goes to another source.

The weights move as far and as often as with the rule itself, so what it gains over its control is what the
router knows of the sources. Axes: D sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategies.gate_load import GateLoad
from megatron_dynmix.mixing.strategies.uniqueness import Uniqueness
from megatron_dynmix.mixing.strategy import Proposal, Signal
from megatron_dynmix.mixing.weights import normalise_weights, reweight


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffledDelta(GateLoad):
    """`GateLoad` with its deltas permuted: one permutation for a run, from its seed."""

    name: ClassVar[str] = "shuffled-delta"

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Gate-load's proposal, made again from the permuted deltas."""
        real = super().propose(weights_D, signal, state)
        delta_D = real.delta_D[derangement(len(weights_D), signal.seed)]
        new_D = reweight(weights_D, delta_D, eta=self.eta, smoothing=self.smoothing)
        return dataclasses.replace(real, weights_D=new_D, delta_D=delta_D)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffledUniqueness(Uniqueness):
    """`Uniqueness`, from an even prior, with what it says of each source said of another."""

    name: ClassVar[str] = "shuffled-uniqueness"

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Uniqueness's proposal, its weights permuted."""
        real = super().propose(weights_D, signal, state)
        permuted_D = derangement(len(weights_D), signal.seed)
        return dataclasses.replace(
            real, weights_D=normalise_weights(real.weights_D[permuted_D]), delta_D=real.delta_D[permuted_D]
        )


def derangement(num_sources: int, seed: int) -> NDArray[np.int64]:
    """Return a permutation that leaves no source in its place, the same for one seed."""
    rng = np.random.default_rng(seed)
    places_D = np.arange(num_sources)
    while True:
        permuted_D = rng.permutation(num_sources)
        if not np.any(permuted_D == places_D):
            return permuted_D
