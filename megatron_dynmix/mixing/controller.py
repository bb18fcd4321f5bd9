"""The mixing controller: holds the weights, asks the strategy for new ones, and checks the answer.

Axes: D sources, L MoE layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .strategy import Proposal, Signal, Strategy
from .weights import check_weights


@dataclass(frozen=True, kw_only=True, eq=False)
class MixingUpdate:
    """The record of one weight update, one line of ``mixing.jsonl``.

    Attributes:
        iteration: iterations done when the update was made.
        consumed_samples: rows drawn up to then, all sources.
        sources: D names, in the order of every per-source list here.
        old_weights, new_weights: D shares before and after.
        delta: D scores, or None if the strategy scores nothing.
        load: D rows of normalised gate loads, or None.
        distance: D x D distances, or None.
        tokens, rows, epochs: D totals since the start of the run.
        seconds: wall time per phase (signal, reduce, update, rebuild).
        note: what a reader must know about this update, or None.

    """

    iteration: int
    consumed_samples: int
    sources: tuple[str, ...]
    old_weights: ArrayLike
    new_weights: ArrayLike
    delta: ArrayLike | None
    load: ArrayLike | None
    distance: ArrayLike | None
    tokens: ArrayLike
    rows: ArrayLike
    epochs: ArrayLike
    seconds: Mapping[str, float]
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for ``json.dumps``; floats survive the round trip bit for bit."""
        record = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        record["seconds"] = {phase: float(seconds) for phase, seconds in self.seconds.items()}
        return record


class MixingController:
    """Keeps the weights of a run. Holds no clock, rank or file: one rank updates it, the others are told.

    Args:
        sources: D distinct names; the position of a name is its ``dataset_id``.
        weights_D: first weights, >= 0, summing to 1 (see `normalise_weights`).
        strategy: the rule for new weights.

    Raises:
        ValueError: no source, a name twice, or weights that are not shares of D sources.

    """

    def __init__(self, sources: Sequence[str], weights_D: NDArray[np.float64], strategy: Strategy) -> None:
        if not sources or len(set(sources)) < len(sources):
            raise ValueError(f"sources {list(sources)} must be distinct names, at least one")
        self.sources = tuple(sources)
        self.strategy = strategy
        self._weights_D = check_weights(weights_D, len(self.sources))
        self._last_counts: list[NDArray[np.int64] | None] = [None] * len(self.sources)
        self._strategy_state: Mapping[str, Any] = {}

    @property
    def weights_D(self) -> NDArray[np.float64]:
        """Current weights, summing to 1; a read-only array that no later update changes."""
        return self._weights_D

    def update(self, signal: Signal) -> tuple[Proposal, str | None]:
        """Ask the strategy for new weights and adopt them.

        A source that was not drawn in the interval has no tokens. Its last known counts then stand in for
        it; if there are none yet, the weights are kept and the proposal repeats them, with deltas of 0.
        Either way the note says so.

        Returns:
            The adopted proposal, and a note or None.

        Raises:
            ValueError: the strategy refuses the signal, or its proposal holds NaN or infinity, a negative
                weight, the wrong length or weights that do not sum to 1 within 1e-9. The controller is then
                unchanged.

        """
        remembered, note = self._last_counts, None
        if self.strategy.needs_gate_load:
            remembered, note = self._remember(signal)
            known = [counts_LE for counts_LE in remembered if counts_LE is not None]
            signal = replace(signal, counts_DLE=np.stack(known) if len(known) == len(remembered) else None)
        if self.strategy.needs_gate_load and signal.counts_DLE is None:
            proposal = Proposal(
                weights_D=self._weights_D,
                delta_D=np.zeros(len(self.sources)),
                state=self._strategy_state,
            )
        else:
            proposal = self.strategy.propose(self._weights_D, signal, self._strategy_state)
        adopted_D = self._checked(proposal)
        self._weights_D, self._last_counts = adopted_D, remembered
        self._strategy_state = proposal.state
        return proposal, note

    def _remember(self, signal: Signal) -> tuple[list[NDArray[np.int64] | None], str | None]:
        """Counts per source, older ones where the interval brought none, and a note on those."""
        counts_DLE = signal.counts_DLE
        if counts_DLE is None:
            raise ValueError(
                f"strategy {self.strategy.name} needs token counts per expert; the signal holds none"
            )
        if counts_DLE.ndim != 3 or len(counts_DLE) != len(self.sources):
            raise ValueError(
                f"counts have shape {counts_DLE.shape}; give [{len(self.sources)} sources, layers, experts]"
            )
        # Before remembering: a broken row must not wait in the state until its source is next needed.
        for name, counts_LE in zip(self.sources, counts_DLE, strict=True):
            if not np.isfinite(counts_LE).all() or (counts_LE < 0).any():
                raise ValueError(
                    f"source {name!r} has a negative, NaN or infinite token count: {counts_LE.tolist()}"
                )
        remembered = [
            counts_LE.copy() if counts_LE.any() else old
            for counts_LE, old in zip(counts_DLE, self._last_counts, strict=True)
        ]
        for name, counts_LE in zip(self.sources, remembered, strict=True):
            if counts_LE is not None and counts_LE.shape != counts_DLE.shape[1:]:
                raise ValueError(
                    f"last known counts of source {name!r} have shape {counts_LE.shape}, the signal has "
                    f"{counts_DLE.shape[1:]} [layers, experts]; resume with the same model"
                )
        unseen = [
            name for name, counts_LE in zip(self.sources, counts_DLE, strict=True) if not counts_LE.any()
        ]
        unknown = [name for name, old in zip(self.sources, remembered, strict=True) if old is None]
        if unknown:
            return remembered, f"weights kept: no tokens measured yet from {', '.join(unknown)}"
        if unseen:
            return remembered, f"no tokens in this interval, last known counts used: {', '.join(unseen)}"
        return remembered, None

    def _checked(self, proposal: Proposal) -> NDArray[np.float64]:
        """The proposal's weights, after every array in it was found fit to adopt and record."""
        weights_D = check_weights(proposal.weights_D, len(self.sources))
        if proposal.delta_D.shape != weights_D.shape:
            raise ValueError(f"delta has shape {proposal.delta_D.shape}; need ({len(self.sources)},)")
        for what, values in (
            ("delta", proposal.delta_D),
            ("load", proposal.load_DE),
            ("distance", proposal.distance_DD),
        ):
            if values is not None and not np.isfinite(values).all():
                raise ValueError(
                    f"strategy {self.strategy.name} gave a NaN or infinite {what}: {values.tolist()}"
                )
        return weights_D

    def state_dict(self) -> dict[str, Any]:
        """Sources, weights and last known counts in JSON types; loading it gives the same bits back."""
        return {
            "sources": list(self.sources),
            "weights": self._weights_D.tolist(),
            "last_counts": [_plain(counts_LE) for counts_LE in self._last_counts],
            "strategy": self._strategy_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a controller with the same sources in the same order.

        Raises:
            ValueError: the sources differ (the differences are listed), or the saved values cannot be used.
                The controller is then unchanged.

        """
        saved = list(state["sources"])
        if saved != list(self.sources):
            missing = [name for name in saved if name not in self.sources]
            added = [name for name in self.sources if name not in saved]
            change = f"no longer there {missing}, new {added}" if missing or added else "the order changed"
            raise ValueError(
                f"the saved mix has sources {saved}, this run has {list(self.sources)}: {change}; "
                "resume with the same sources in the same order"
            )
        if len(state["last_counts"]) != len(saved):
            raise ValueError(
                f"the saved mix has counts of {len(state['last_counts'])} sources; need {len(saved)}"
            )
        weights_D = check_weights(np.array(state["weights"], dtype=np.float64), len(saved))
        self._last_counts = [None if c is None else np.array(c) for c in state["last_counts"]]
        self._weights_D = weights_D
        self._strategy_state = state["strategy"]


def _plain(values: ArrayLike | None) -> Any:
    """Nested lists of Python numbers, or None."""
    return None if values is None else np.asarray(values).tolist()
