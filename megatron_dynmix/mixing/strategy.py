"""What a mixing strategy is given, what it answers, and what it must offer.

Axes: D sources, L MoE layers, E experts (in ``load_DE``: of all chosen layers).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Signal:
    """What was measured in one interval. A strategy reads the part it needs.

    Attributes:
        counts_DLE: tokens routed to each expert (or loads given from outside), padding not counted; None
            where not measured.
        loss_D: mean loss per trained token in nats; None where not measured.

    """

    counts_DLE: NDArray[np.int64] | NDArray[np.float64] | None = None
    loss_D: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Proposal:
    """New weights, and the numbers they came from.

    Attributes:
        weights_D: shares of the sources in what is drawn next, summing to 1.
        delta_D: scores; larger means more weight. Zeros where nothing was scored.
        load_DE: normalised gate loads; None where the strategy uses none.
        distance_DD: distances between loads; None where the strategy uses none.

    """

    weights_D: NDArray[np.float64]
    delta_D: NDArray[np.float64]
    load_DE: NDArray[np.float64] | None = None
    distance_DD: NDArray[np.float64] | None = None


class Strategy(Protocol):
    """A rule from current weights and a signal to new weights; it keeps no state of its own."""

    @property
    def name(self) -> str:
        """Name in configuration and logs."""
        ...

    @property
    def needs_gate_load(self) -> bool:
        """Whether `Signal.counts_DLE` must be measured."""
        ...

    @property
    def updates(self) -> bool:
        """False if the weights never change, so that no signal need be measured at all."""
        ...

    def propose(self, weights_D: NDArray[np.float64], signal: Signal) -> Proposal:
        """Propose the next weights; must not change its arguments.

        Raises:
            ValueError: the signal lacks what the strategy needs, or holds values it cannot use.

        """
        ...
