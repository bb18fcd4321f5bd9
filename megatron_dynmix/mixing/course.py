"""The course of one strategy through a run: the weights it goes on from, and what it remembers.

Axes: D sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .strategy import Proposal, Signal, Strategy
from .weights import check_weights


@dataclass(frozen=True, eq=False)
class Course:
    """Where a strategy stands.

    Attributes:
        weights_D: what it goes on from, which need not be what it proposed.
        first_D: what it began the run with; a strategy that never updates stays with them.
        state: `Proposal.state` of its last update.

    """

    weights_D: NDArray[np.float64]
    first_D: NDArray[np.float64]
    state: Mapping[str, Any] = field(default_factory=dict)

    def start(self, strategy: Strategy, signal: Signal) -> Proposal:
        """Its first weights: its own choice if it starts, otherwise those given."""
        # A strategy that never updates is asked too: it may have to refuse the weights that it is to keep.
        if strategy.starts or not strategy.updates:
            return checked(strategy.propose(self.weights_D, signal, {}), strategy, len(self.weights_D))
        return self._kept(self.weights_D)

    def update(self, strategy: Strategy, signal: Signal, *, known: bool) -> Proposal:
        """Its next weights; without all that it needs `known` of the sources, those it has.

        Raises:
            ValueError: it refuses the signal, or proposes something that cannot be adopted.

        """
        if not strategy.updates:
            return self._kept(self.first_D)
        if not known:
            return self._kept(self.weights_D)
        proposal = strategy.propose(self.weights_D, signal, self.state)
        return checked(proposal, strategy, len(self.weights_D))

    def _kept(self, weights_D: NDArray[np.float64]) -> Proposal:
        return Proposal(weights_D=weights_D, delta_D=np.zeros(len(weights_D)), state=self.state)

    def state_dict(self) -> dict[str, Any]:
        """In JSON types; loading it gives the same bits back."""
        return {
            "weights": self.weights_D.tolist(),
            "first_weights": self.first_D.tolist(),
            "strategy": self.state,
        }

    def loaded(self, state: Mapping[str, Any]) -> "Course":
        """The course that a `state_dict` holds.

        Raises:
            ValueError: its weights are no shares of as many sources.

        """
        return replace(
            self,
            weights_D=check_weights(np.array(state["weights"], dtype=np.float64), len(self.weights_D)),
            first_D=check_weights(np.array(state["first_weights"], dtype=np.float64), len(self.weights_D)),
            state=state["strategy"],
        )


def checked(proposal: Proposal, strategy: Strategy, num_sources: int) -> Proposal:
    """The proposal, after every array in it was found fit to adopt and record.

    Raises:
        ValueError: weights that are no shares of so many sources, or a score, load or distance that is NaN or
            infinite.

    """
    weights_D = check_weights(proposal.weights_D, num_sources)
    if proposal.delta_D.shape != weights_D.shape:
        raise ValueError(f"delta has shape {proposal.delta_D.shape}; need ({num_sources},)")
    for what, values in (
        ("delta", proposal.delta_D),
        ("load", proposal.load_DE),
        ("distance", proposal.distance_DD),
        ("delta error", proposal.delta_error_D),
    ):
        if values is not None and not np.isfinite(values).all():
            raise ValueError(f"strategy {strategy.name} gave a NaN or infinite {what}: {values.tolist()}")
    return replace(proposal, weights_D=weights_D)
