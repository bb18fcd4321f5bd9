"""How evenly the experts of each MoE layer are used, and how differently by the sources.

Axes: D sources, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dynmix.mixing.gate_loads import l2_distance
from megatron_dynmix.mixing.strategy import Counts
from megatron_dynmix.mixing.weights import Floats


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """Numbers by MoE layer; where no token was routed a layer counts as even.

    Attributes:
        busiest: load of the busiest expert over the mean one, in the mix; 1 is even.
        cv_squared: squared coefficient of variation of the experts' loads in the mix, 0 if even: the
            CV(O)^2 of Zhu et al. (2025), equation 3 and figure 2, with the variance of a sample, divided by
            E - 1, as the official code takes it.
        specialization: mean distance, l2 as in Algorithm 1, between the loads of any two sources; 0 if every
            expert serves all sources alike. None with fewer than two sources that were measured.

    """

    busiest: list[float]
    cv_squared: list[float]
    specialization: list[float] | None


def expert_use(counts_DLE: Counts, weights_D: Floats) -> ExpertUse | None:
    """Describe the experts' use in a mix with these weights; None if no token was counted.

    Sources are weighted as they are drawn, whatever was measured of each.
    """
    total_DL1 = counts_DLE.sum(axis=2, keepdims=True)
    if not total_DL1.any():
        return None
    load_DLE = counts_DLE / np.maximum(total_DL1, 1)
    mix_LE = np.einsum("d,dle->le", weights_D, load_DLE)
    mean_L = np.where(mix_LE.any(axis=1), mix_LE.mean(axis=1), 1)
    variance_L = mix_LE.var(axis=1, ddof=1) if mix_LE.shape[1] > 1 else np.zeros(len(mix_LE))
    return ExpertUse(
        busiest=(mix_LE.max(axis=1) / mean_L).tolist(),
        cv_squared=(variance_L / mean_L**2).tolist(),
        specialization=_specialization(load_DLE[total_DL1.all(axis=(1, 2))]),
    )


def _specialization(load_DLE: Floats) -> list[float] | None:
    pairs = len(load_DLE) * (len(load_DLE) - 1)
    if not pairs:
        return None
    return [float(l2_distance(load_DLE[:, [layer]]).sum()) / pairs for layer in range(load_DLE.shape[1])]
