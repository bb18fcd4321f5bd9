"""What a mixing strategy is given, what it answers, and what it must offer.

Axes: H halves, D sources, L MoE layers, E experts.

What strategies need of a signal, or a refusal that says what is missing.

Axes: D sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64] | NDArray[np.float64]
HALVES = 2


def half_of(ordinal: Any) -> Any:
    """Return the half of its source, 0 or 1, in which the row with that number is counted."""
    return ordinal % HALVES


class SourceError(ValueError):
    """Something is wrong with some sources, which `mixing` knows by their numbers only.

    Attributes:
        dataset_ids: the sources.

    """

    def __init__(self, dataset_ids: Sequence[int], problem: str, *, before: str = "") -> None:
        """Say `before`, then which sources, then `problem`."""
        self.dataset_ids = tuple(int(number) for number in dataset_ids)
        self._before, self._problem = before, problem
        numbers = str(self.dataset_ids[0]) if len(self.dataset_ids) == 1 else str(list(self.dataset_ids))
        super().__init__(self._sentence(f"{numbers} (counted from 0)"))

    def named(self, sources: Sequence[str]) -> str:
        """Return the message with the names of the run's sources in it."""
        return self._sentence(", ".join(sources[number] for number in self.dataset_ids))

    def within(self, where: str) -> "SourceError":
        """Return the same error, its message beginning with `where`."""
        return SourceError(self.dataset_ids, self._problem, before=f"{where}: {self._before}")

    def _sentence(self, which: str) -> str:
        noun = "source" if len(self.dataset_ids) == 1 else "sources"
        return f"{self._before}{noun} {which} {self._problem}"


RemarkKind = Literal[
    # what changed a proposal
    "override",
    "max_epochs",
    "floor",
    "entropy",
    "kl_step",
    # what a reader must know about an update
    "kept",
    "shadow_kept",
    "last_known",
    "shadow_failed",
    "few_tokens",
    "override_not_followed",
    "override_unusable",
]


@dataclass(frozen=True)
class Remark:
    """A line about one update: for programs its kind, for people its text."""

    kind: RemarkKind
    text: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Signal:
    """What is known when new weights are due. A strategy reads the part it needs.

    Attributes:
        counts_DLE: tokens routed to each expert (or loads given from outside), padding not counted; None
            where not measured.
        half_counts_HDLE: the same counts in two parts, of every source's even and odd rows, which add up to
            `counts_DLE`; None where not measured. How far they disagree tells how noisy the loads are.
        loss_D: mean loss per trained token in nats; NaN for a source without tokens; None where not measured.
        iteration: iterations done; 0 before the first one.
        train_iters: iterations of the whole run.
        interval_rows: rows that will be drawn until the next weights, all sources together.
        run_rows: rows that the whole run draws, all sources together.
        size_D: rows in one epoch of each source.
        drawn_D: rows of each source drawn so far, repeated epochs counted again.
        seed: of the run, for strategies that throw dice; they draw from (seed, iteration) and nothing else.

    """

    counts_DLE: Counts | None = None
    half_counts_HDLE: Counts | None = None
    loss_D: NDArray[np.float64] | None = None
    iteration: int = 0
    train_iters: int = 0
    interval_rows: int = 0
    run_rows: int = 0
    size_D: NDArray[np.int64] | None = None
    drawn_D: NDArray[np.int64] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Proposal:
    """New weights, and the numbers they came from.

    Attributes:
        weights_D: shares of the sources in what is drawn next, summing to 1.
        delta_D: scores; larger means more weight. Zeros where nothing was scored.
        load_DLE: normalized gate loads of the layers that the strategy reads; None where it uses none.
        distance_DD: distances between loads; None where the strategy uses none.
        state: what the strategy wants to be given at its next update, in JSON types.
        delta_error_D: one standard error of each score; None where not known.

    """

    weights_D: NDArray[np.float64]
    delta_D: NDArray[np.float64]
    load_DLE: NDArray[np.float64] | None = None
    distance_DD: NDArray[np.float64] | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    delta_error_D: NDArray[np.float64] | None = None


class Strategy(Protocol):
    """A rule from current weights and a signal to new weights.

    It keeps nothing itself: what it must remember goes out with the proposal and comes back with the next
    call, so that a checkpoint holds it and a replay of the recorded signals gives the same weights.

    A strategy on gate loads may also have `needs_halves`, whether `Signal.half_counts_HDLE` must be measured
    (without it: no), and `layers`, those that it reads, see `select_layers` (without it: all).
    """

    @property
    def name(self) -> str:
        """Name in configuration and logs."""
        ...

    @property
    def needs_gate_load(self) -> bool:
        """Whether `Signal.counts_DLE` must be measured."""
        ...

    @property
    def needs_loss(self) -> bool:
        """Whether `Signal.loss_D` must be measured."""
        ...

    @property
    def starts(self) -> bool:
        """Whether it chooses the first weights too, asked at iteration 0 with nothing measured."""
        ...

    @property
    def updates(self) -> bool:
        """False if the weights never change after the start, so that nothing need be measured at all."""
        ...

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the next weights; must not change its arguments.

        Args:
            weights_D: weights in force, which a guardrail or the operator may have changed.
            signal: what was measured.
            state: `Proposal.state` of the last update; empty at the first.

        Raises:
            ValueError: the signal lacks what the strategy needs, or holds values it cannot use.

        """
        ...


def loss_of(signal: Signal, num_sources: int, strategy: str) -> NDArray[np.float64]:
    """The losses of the signal, one finite number of nats >= 0 per source.

    Raises:
        ValueError: not measured, another number of sources, or a source (named by its index) whose loss is
            NaN (nothing of it was ever measured), infinite or negative.

    """
    if signal.loss_D is None:
        raise ValueError(f"{strategy} mixing needs a loss per source; the signal holds none")
    loss_D = np.asarray(signal.loss_D, dtype=np.float64)
    if loss_D.shape != (num_sources,):
        raise ValueError(
            f"losses have shape {loss_D.shape}; {strategy} mixing needs one per source, ({num_sources},)"
        )
    bad = np.flatnonzero(~(np.isfinite(loss_D) & (loss_D >= 0)))
    if bad.size:
        raise SourceError(
            bad[:1].tolist(),
            f"has the loss {loss_D[bad[0]]}; {strategy} mixing needs a finite mean loss >= 0 of every source "
            "(NaN: no trained token of it was measured yet)",
        )
    return loss_D


def size_of(signal: Signal, num_sources: int, strategy: str) -> NDArray[np.float64]:
    """Rows in one epoch of each source, all >= 1.

    Raises:
        ValueError: not given, another number of sources, or a source without a row.

    """
    need = f"{strategy} mixing needs the size of every source in rows"
    return _rows(signal.size_D, num_sources, need, lowest=1)


def drawn_of(signal: Signal, num_sources: int, strategy: str) -> NDArray[np.float64]:
    """Rows of each source drawn so far, all >= 0.

    Raises:
        ValueError: not given, another number of sources, or a negative number.

    """
    need = f"{strategy} mixing needs the rows drawn of every source"
    return _rows(signal.drawn_D, num_sources, need, lowest=0)


def _rows(
    given_D: NDArray[np.int64] | None, num_sources: int, need: str, *, lowest: int
) -> NDArray[np.float64]:
    if given_D is None:
        raise ValueError(f"{need}; the signal does not tell")
    rows_D = np.asarray(given_D, dtype=np.float64)
    if rows_D.shape != (num_sources,) or not (np.isfinite(rows_D) & (rows_D >= lowest)).all():
        raise ValueError(f"{need}: {num_sources} numbers >= {lowest}, not {rows_D.tolist()}")
    return rows_D


def numbers_of(values: object, what: str, *, lowest: float = -np.inf) -> NDArray[np.float64]:
    """A list of numbers given as an option, as a flat finite array.

    Raises:
        ValueError: not a flat list of numbers, none at all, or one that is not finite or below ``lowest``.

    """
    try:
        numbers_D = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} {values!r} is not a list of numbers; give one per source") from None
    if numbers_D.ndim != 1 or numbers_D.size == 0:
        raise ValueError(f"{what} {values!r} is not a flat list; give one number per source")
    bad = np.flatnonzero(~(np.isfinite(numbers_D) & (numbers_D >= lowest)))
    if bad.size:
        bound = f" >= {lowest:g}" if np.isfinite(lowest) else ""
        raise SourceError(
            bad[:1].tolist(), f"is {numbers_D[bad[0]]:g}; give a finite number{bound}", before=f"{what} of "
        )
    return numbers_D
