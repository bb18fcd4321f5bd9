"""The course of one strategy through a run: the weights it goes on from, and what it remembers.

Axes: D sources.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_dynmix.mixing.strategy import Proposal, Signal, Strategy
from megatron_dynmix.mixing.weights import check_weights


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
    """The proposal, after all of it was found fit to adopt, record and save.

    Raises:
        ValueError: no proposal, weights that are no shares of so many sources, a score, load or distance that
            is NaN or infinite, or a state that would not come back from a checkpoint as it is.

    """
    if not isinstance(proposal, Proposal):
        raise ValueError(f"strategy {strategy.name} gave {type(proposal).__name__}; it must give a Proposal")
    weights_D = check_weights(proposal.weights_D, num_sources)
    delta_D = _fit("delta", proposal.delta_D, (num_sources,), strategy)
    assert delta_D is not None, "a proposal has scores"
    load_DE = _fit("load", proposal.load_DE, (num_sources, -1), strategy)
    distance_DD = _fit("distance", proposal.distance_DD, (num_sources, num_sources), strategy)
    error_D = _fit("delta error", proposal.delta_error_D, (num_sources,), strategy)
    _check_state(proposal.state, strategy)
    return replace(
        proposal,
        weights_D=weights_D,
        delta_D=delta_D,
        load_DE=load_DE,
        distance_DD=distance_DD,
        delta_error_D=error_D,
    )


def _fit(
    what: str, values: ArrayLike | None, shape: tuple[int, ...], strategy: Strategy
) -> NDArray[np.float64] | None:
    """One part of a proposal as an array of that shape, -1 being any length; None stays None."""
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != len(shape) or any(
        need not in (-1, size) for size, need in zip(array.shape, shape, strict=True)
    ):
        need = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise ValueError(f"strategy {strategy.name} gave a {what} of shape {array.shape}; need ({need})")
    if not np.isfinite(array).all():
        raise ValueError(f"strategy {strategy.name} gave a NaN or infinite {what}: {array.tolist()}")
    return array


def _check_state(state: Mapping[str, Any], strategy: Strategy) -> None:
    """Now, not at the next checkpoint: a save that fails would lose what was trained since the last one."""
    try:
        survives = json.loads(json.dumps(state, allow_nan=False)) == state
    except (TypeError, ValueError):
        survives = False
    if not survives:
        raise ValueError(
            f"strategy {strategy.name} wants to remember {state!r}, which JSON does not give back as it is; "
            "use text keys, lists, finite numbers and text"
        )
