"""The mix whose gate load is that of a target set. Axes: D sources, V = layers x experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dynmix.mixing.gate_loads import check_layers, gate_load
from megatron_dynmix.mixing.strategy import Proposal, Signal, Strategy
from megatron_dynmix.mixing.weights import Floats, balancing_weights


@dataclass(frozen=True, kw_only=True)
class MatchLoad(Strategy):
    """Weights whose mixed load is nearest to that of a target set: min ||sum_i w_i o_i - o_target||.

    As Domain2Vec has it (Zhang et al., 2025), with the router for a domain classifier. The target is one of
    the sources, measured on its held-out rows and never drawn. A quadratic problem over the simplex, solved
    exactly; of several mixes that are as near, the evenest. Nothing is accumulated.

    Attributes:
        layers: MoE layers whose loads are compared: ``all``, ``last``, or a list of them, counted from 0.

    """

    target_source: int
    layers: str | Sequence[int] = "all"

    name = "match-load"
    needs_gate_load = True
    starts = True

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if not isinstance(self.target_source, int) or self.target_source < 0:
            raise ValueError(f"target_source {self.target_source!r} is no number of a source, 0 or more")

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Solve for the weights; before anything is measured, those in force without the target."""
        if not self.target_source < len(weights_D) > 1:
            raise ValueError(
                f"match-load mixing has source {self.target_source} for its target and {len(weights_D)} "
                "sources; it needs one to draw from beside the target"
            )
        others = np.arange(len(weights_D)) != self.target_source
        delta_D = np.zeros(len(weights_D))
        if signal.counts_DLE is None:
            new_D = np.where(others, weights_D, 0)
            new_D = new_D if new_D.any() else others / others.sum()
            return Proposal(weights_D=new_D / new_D.sum(), delta_D=delta_D)
        if len(signal.counts_DLE) != len(weights_D):
            raise ValueError(f"counts for {len(signal.counts_DLE)} sources, weights for {len(weights_D)}")
        load_DLE = gate_load(signal.counts_DLE, self.layers, by_layer=True)
        load_DV = load_DLE.reshape(len(load_DLE), -1)
        new_D = np.zeros(len(weights_D))
        # The weights sum to 1: the mix of the differences is the difference of the mix.
        new_D[others] = balancing_weights((load_DV[others] - load_DV[self.target_source]).T)
        return Proposal(weights_D=new_D, delta_D=delta_D, load_DLE=load_DLE)
