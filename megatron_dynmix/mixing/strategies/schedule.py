"""Weights that follow a plan made before the run.

Axes: P points of the plan, D sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.require import numbers_of
from megatron_dynmix.mixing.strategy import Proposal, Signal
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
            except ValueError as error:
                raise ValueError(f"schedule at iteration {point[0]}: {error}") from None
        return iterations, weights_PD


def _is_iteration(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
