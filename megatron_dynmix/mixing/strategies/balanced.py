"""Weights that balance the sources by their gate loads, from the loads alone.

Axes: D sources, L chosen layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.distance import DISTANCES
from megatron_dynmix.mixing.gate_loads import check_layers, gate_load
from megatron_dynmix.mixing.strategy import Proposal, Signal

RIDGE = 1e-8
"""Added to the diagonal, relative to its mean: of several solutions (equal sources) it picks the even one."""
ROUNDING = 1e-12
"""Gain that counts as none; below what the ridge makes of two equal sources."""


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """The mix that is closest to all sources: min over w of sum_i (sum_j w_j delta_ij)^2.

    The Balanced baseline of Zhu et al. (2025), section 4.6.1, equation 4, which minimises the squared sums of
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

    name: ClassVar[str] = "balanced"
    needs_gate_load: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.metric not in DISTANCES:
            raise ValueError(f"metric {self.metric!r} is unknown; give one of {sorted(DISTANCES)}")
        check_layers(self.layers)

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Counts -> loads -> distances -> weights; the current weights are not read.

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
    """Shares w that minimise ||distance_DD w||; uniform if all distances are 0.

    Scaling w scales the objective, so with Q = distance^T distance the shares are those of the minimiser of
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
    """Minimise over the used sources; drop (from ``used`` too) those that would become negative."""
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
