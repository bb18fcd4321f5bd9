"""Baselines of the paper that change the weights without measuring anything.

Axes: D sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import Proposal, Signal

OTHERS = 1e-5
"""Weight of every source but one, before all are divided by their sum: that of the official code."""


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """One source after the other, in the order of the configuration, round and round.

    The Sequential baseline of Zhu et al. (2025), section 4: weights [1, 1e-5, ...], moved on by one source
    every 500 iterations. Which source is due follows from the iteration alone; it changes at the first update
    at or after each multiple of ``every``, so the interval should divide it.

    Attributes:
        every: iterations per source, >= 1.

    Raises:
        ValueError: on construction, for another ``every``.

    """

    every: int = 500

    name: ClassVar[str] = "sequential"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = True
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every {self.every} is no number of iterations; give a whole number >= 1")

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Nearly all weight on the source that is due; the current weights are not read."""
        return _one_source(signal.iteration // self.every % len(weights_D), len(weights_D))


@dataclass(frozen=True, kw_only=True)
class Random:
    """New random weights at every update: w_i = u_i / sum u with u_i from U(0, 1).

    The Random baseline of Zhu et al. (2025), section 4; not uniform on the simplex. The weights of the first
    interval are the configured ones, as there. The dice are thrown from (seed, iteration) only.
    """

    name: ClassVar[str] = "random"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Random shares; the current weights are not read."""
        # 1 - [0, 1) lies in (0, 1], so the sum is never 0.
        share_D = 1 - _dice(signal).random(len(weights_D))
        return Proposal(weights_D=share_D / share_D.sum(), delta_D=np.zeros(len(weights_D)))


@dataclass(frozen=True, kw_only=True)
class RandomBatch:
    """One source, drawn anew at every update, gets weight 1, all others 1e-5.

    In the official code of Zhu et al. (2025) only; the paper does not use it. The weights of the first
    interval are the configured ones. The dice are thrown from (seed, iteration) only.
    """

    name: ClassVar[str] = "random-batch"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Nearly all weight on one source by chance; the current weights are not read."""
        return _one_source(int(_dice(signal).integers(len(weights_D))), len(weights_D))


def _dice(signal: Signal) -> np.random.Generator:
    return np.random.default_rng([signal.seed, signal.iteration])


def _one_source(chosen: int, num_sources: int) -> Proposal:
    share_D = np.full(num_sources, OTHERS)
    share_D[chosen] = 1
    return Proposal(weights_D=share_D / share_D.sum(), delta_D=np.zeros(num_sources))
