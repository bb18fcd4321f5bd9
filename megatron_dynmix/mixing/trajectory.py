"""How the weights of a run moved, in a few numbers. Axes: N points in time, D sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_dynmix.mixing.weights import Floats

NEAR = 0.01
"""Weights that are so near to the last ones, each of them, count as settled."""
STILL = 1e-3
"""A weight that moves by less stands still: it takes no turn."""


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What a reader wants to know of a trajectory of weights.

    Attributes:
        settled: the iteration from which on all weights stay within `NEAR` of the last ones.
        turns: how often the weight that did so most changed its direction.
        path: how far the mix went, the sum of its steps; a step is the share of the mix that was exchanged,
            from 0 to 1.
        net: how far the last mix is from the first, in the same unit.

    """

    settled: int
    turns: int
    path: float
    net: float


def motion(iterations: Sequence[int], weights_ND: ArrayLike) -> Motion:
    """Describe weights that came into force after so many iterations each; the first ones begin the run."""
    weights_ND = np.asarray(weights_ND, np.float64)
    far_N = np.abs(weights_ND - weights_ND[-1]).max(axis=1) > NEAR
    settled = int(np.flatnonzero(far_N)[-1]) + 1 if far_N.any() else 0
    return Motion(
        settled=iterations[settled],
        turns=max(map(_turns, weights_ND.T)),
        path=float(np.abs(np.diff(weights_ND, axis=0)).sum() / 2),
        net=exchanged(weights_ND[0], weights_ND[-1]),
    )


def exchanged(one_D: Floats, other_D: Floats) -> float:
    """Return the share of a mix that differs from another: half the sum of the differences, 0 to 1."""
    return float(np.abs(one_D - other_D).sum() / 2)


def _turns(weight_N: Floats) -> int:
    """Count changes of direction; what moves by less than `STILL` since the last turning point does not."""
    turns, direction, extreme = 0, 0, float(weight_N[0])
    for weight in map(float, weight_N[1:]):
        step = weight - extreme
        if direction and step * direction >= 0:
            extreme = weight
        elif abs(step) >= STILL:
            turns += direction != 0
            direction, extreme = (1 if step > 0 else -1), weight
    return turns
