"""Weights that follow a plan made before the run.

Axes: P points of the plan, D sources.

Baselines of the paper that change the weights without measuring anything.

Axes: D sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import Proposal, Signal, SourceError, numbers_of
from megatron_dynmix.mixing.weights import normalise_weights

INTERPOLATIONS = ("steps", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Weights given for some iterations, held or blended in between; after the last they stay.

    Between points at iterations a < b, with t = (k - a) / (b - a): ``steps`` keeps the weights of a,
    ``linear`` takes (1 - t) w_a + t w_b, ``cosine`` the same with (1 - cos(pi t)) / 2 for t. The weights are
    those at the iteration of the update and hold for the interval that follows.

    Attributes:
        points: (iteration, weights) pairs; the weights, one per source in the order of the sources, are in
            any unit. The first iteration is 0, and they rise.
        interpolation: ``steps``, ``linear`` or ``cosine``.

    Raises:
        ValueError: on construction, for points that are no such plan.

    """

    points: Sequence[tuple[int, Sequence[float]]]
    interpolation: str = "steps"

    name: ClassVar[str] = "schedule"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = True
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown; give one of {INTERPOLATIONS}")
        iterations, weights_PD = self._plan()
        if iterations[0] != 0:
            raise ValueError(
                f"the first point of the schedule is at iteration {iterations[0]}; the run starts at 0: add "
                "its weights there"
            )
        for earlier, later in pairwise(iterations):
            if later <= earlier:
                raise ValueError(f"iteration {later} follows {earlier} in the schedule; iterations must rise")
        if len({len(weights_D) for weights_D in weights_PD}) > 1:
            raise ValueError("the points of the schedule have weights for different numbers of sources")

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """The plan's weights at this iteration; the current weights are not read.

        Raises:
            ValueError: the plan is for another number of sources.

        """
        iterations, weights_PD = self._plan()
        if len(weights_PD[0]) != len(weights_D):
            raise ValueError(
                f"the schedule is for {len(weights_PD[0])} sources; the run has {len(weights_D)}"
            )
        last = int(np.searchsorted(iterations, signal.iteration, side="right")) - 1
        planned_D = weights_PD[last]
        if self.interpolation != "steps" and last + 1 < len(iterations):
            done = (signal.iteration - iterations[last]) / (iterations[last + 1] - iterations[last])
            if self.interpolation == "cosine":
                done = (1 - np.cos(np.pi * done)) / 2
            planned_D = (1 - done) * planned_D + done * weights_PD[last + 1]
        return Proposal(weights_D=planned_D.copy(), delta_D=np.zeros(len(weights_D)))

    def _plan(self) -> tuple[list[int], list[NDArray[np.float64]]]:
        """The iterations, and the shares at each."""
        if isinstance(self.points, str) or not self.points:
            raise ValueError("the schedule has no points; give [[0, weights], [iteration, weights], ...]")
        iterations, weights_PD = [], []
        for point in self.points:
            if not (isinstance(point, Sequence) and len(point) == 2 and _is_iteration(point[0])):
                raise ValueError(f"point {point!r} of the schedule is not [iteration, weights]")
            iterations.append(int(point[0]))
            try:
                weights_PD.append(normalise_weights(numbers_of(point[1], "weight")))
            except SourceError as error:
                raise error.within(f"schedule at iteration {point[0]}") from None
            except ValueError as error:
                raise ValueError(f"schedule at iteration {point[0]}: {error}") from None
        return iterations, weights_PD


def _is_iteration(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
