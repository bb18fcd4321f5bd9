"""What a mixing strategy is given, what it answers, and what it must offer.

Axes: H halves, D sources, L MoE layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.weights import Floats, example_shares, row_shares

Counts = NDArray[np.int64] | Floats
HALVES = 2


def half_of(ordinal: Any) -> Any:
    """Return the half of its source, 0 or 1, in which the row with that number is counted."""
    return ordinal % HALVES


@dataclass(frozen=True, eq=False, kw_only=True)
class Signal:
    """What is known when new weights are due. A strategy reads the part it needs.

    Attributes:
        counts_DLE: tokens routed to each expert (or loads given from outside), padding not counted; None
            where not measured.
        half_counts_HDLE: the same counts in two parts, of every source's even and odd rows, which add up to
            `counts_DLE`; None where not measured. How far they disagree tells how noisy the loads are.
        stale_D: of which sources the halves are the last known ones, already given at an earlier update; None
            where all are new.
        same_rows: whether every update measures the same rows, so that counts of several tell no more than
            those of the last.
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
    stale_D: NDArray[np.bool_] | None = None
    same_rows: bool = False
    loss_D: Floats | None = None
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
        notes: what a reader must know about it.

    """

    weights_D: Floats
    delta_D: Floats
    load_DLE: Floats | None = None
    distance_DD: Floats | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    delta_error_D: Floats | None = None
    notes: "tuple[Remark, ...]" = ()


class Strategy:
    """A rule from current weights and a signal to new weights.

    It keeps nothing itself: what it must remember goes out with the proposal and comes back with the next
    call, so that a checkpoint holds it and a replay of the recorded signals gives the same weights.
    """

    name: str
    """Name in configuration and logs."""
    needs_gate_load: bool = False
    """Whether `Signal.counts_DLE` must be measured."""
    needs_halves: bool = False
    """Whether `Signal.half_counts_HDLE` must be measured too."""
    needs_loss: bool = False
    """Whether `Signal.loss_D` must be measured."""
    layers: str | Sequence[int] = "all"
    """MoE layers whose loads it reads, see `gate_loads.select_layers`."""
    starts: bool = False
    """Whether it chooses the first weights too, asked at iteration 0 with nothing measured."""
    updates: bool = True
    """False if the weights never change after the start, so that nothing need be measured at all."""

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the next weights, or refuse the signal by a ValueError; must not change its arguments.

        `weights_D` are those in force, which a guardrail or the operator may have changed; `state` is
        `Proposal.state` of the last update, empty at the first.
        """
        raise NotImplementedError


class Wrapped(Strategy):
    """A strategy that offers what another object does, with the defaults for what that lacks."""

    REQUIRED = ("name", "needs_gate_load", "needs_loss", "starts", "updates", "propose")
    OPTIONAL = ("needs_halves", "layers")

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        for part in (*self.REQUIRED[:-1], *self.OPTIONAL):
            if hasattr(inner, part):
                setattr(self, part, getattr(inner, part))

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose what the other does."""
        proposal: Proposal = self.inner.propose(weights_D, signal, state)
        return proposal


class BeginningWith(Wrapped):
    """A strategy whose first weights another one chooses, which measures nothing.

    Dynamic_SentEmb of Zhu et al. (2025), table 2, is gate-load mixing that begins with sent-emb's weights.
    """

    def __init__(self, inner: Strategy, first: Strategy) -> None:
        super().__init__(inner)
        self._first = first
        self.starts = True

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose what the one or the other does."""
        if signal.iteration > 0:
            return super().propose(weights_D, signal, state)
        return replace(self._first.propose(weights_D, signal, {}), state={})  # not the other's to remember


class InExamples(Wrapped):
    """A strategy whose weights, sizes and draws count examples, in a run that counts rows."""

    def __init__(self, inner: Strategy, examples_per_row_D: Floats) -> None:
        super().__init__(inner)
        self.examples_per_row_D = examples_per_row_D

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Ask it in examples; shares of rows in and out."""
        shares_D = example_shares(weights_D, self.examples_per_row_D)
        proposal = super().propose(shares_D, in_examples(signal, weights_D, self.examples_per_row_D), state)
        return replace(proposal, weights_D=row_shares(proposal.weights_D, self.examples_per_row_D))


def in_examples(signal: Signal, row_weights_D: Floats, examples_per_row_D: Floats) -> Signal:
    """Count sizes, draws and what is still to be drawn in examples instead of rows.

    How many examples so many rows will bring is estimated at the weights in force: it depends on those that
    are still to be found.
    """
    mean = float(row_weights_D @ examples_per_row_D)

    def examples(rows_D: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        return None if rows_D is None else np.rint(rows_D * examples_per_row_D).astype(np.int64)

    return replace(
        signal,
        interval_rows=round(signal.interval_rows * mean),
        run_rows=round(signal.run_rows * mean),
        size_D=examples(signal.size_D),
        drawn_D=examples(signal.drawn_D),
    )


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
    "one_kind",
    "uncertain",
    "override_not_followed",
    "override_unusable",
]


@dataclass(frozen=True)
class Remark:
    """A line about one update: for programs its kind, for people its text."""

    kind: RemarkKind
    text: str


class SourceError(ValueError):
    """Something is wrong with some sources, which `mixing` knows by their numbers only."""

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


def loss_of(signal: Signal, num_sources: int, strategy: str) -> Floats:
    """Return the losses of the signal, one finite number of nats >= 0 per source, or raise ValueError."""
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


def size_of(signal: Signal, num_sources: int, strategy: str) -> Floats:
    """Return the rows in one epoch of each source, all >= 1, or raise ValueError."""
    need = f"{strategy} mixing needs the size of every source in rows"
    return _rows(signal.size_D, num_sources, need, lowest=1)


def drawn_of(signal: Signal, num_sources: int, strategy: str) -> Floats:
    """Return the rows of each source drawn so far, all >= 0, or raise ValueError."""
    need = f"{strategy} mixing needs the rows drawn of every source"
    return _rows(signal.drawn_D, num_sources, need, lowest=0)


def _rows(given_D: NDArray[np.int64] | None, num_sources: int, need: str, *, lowest: int) -> Floats:
    if given_D is None:
        raise ValueError(f"{need}; the signal does not tell")
    rows_D = np.asarray(given_D, dtype=np.float64)
    if rows_D.shape != (num_sources,) or not (np.isfinite(rows_D) & (rows_D >= lowest)).all():
        raise ValueError(f"{need}: {num_sources} numbers >= {lowest}, not {rows_D.tolist()}")
    return rows_D


def numbers_of(values: object, what: str, *, lowest: float = -np.inf) -> Floats:
    """Return a list of numbers given as an option as a flat finite array, or raise ValueError."""
    try:
        numbers_D = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} {values!r:.60} is not a list of numbers; give one per source") from None
    if numbers_D.ndim != 1 or numbers_D.size == 0:
        raise ValueError(f"{what} {values!r} is not a flat list; give one number per source")
    bad = np.flatnonzero(~(np.isfinite(numbers_D) & (numbers_D >= lowest)))
    if bad.size:
        bound = f" >= {lowest:g}" if np.isfinite(lowest) else ""
        raise SourceError(
            bad[:1].tolist(), f"is {numbers_D[bad[0]]:g}; give a finite number{bound}", before=f"{what} of "
        )
    return numbers_D
