"""What was last measured of each source, which completes the signal when an interval brings nothing of it.

Axes: H halves, D sources, L MoE layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import HALVES as NUM_HALVES
from megatron_dynmix.mixing.strategy import Counts, Signal, Strategy
from megatron_dynmix.mixing.weights import Floats


@dataclass(frozen=True)
class Filled:
    """Which sources were not measured in an interval: by something older, or not at all known."""

    stand_ins: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LastKnown:
    """Counts, their halves and the loss of each source when they were last measured; None before that.

    Attributes:
        sources: D names.
        counts: D arrays `[L, E]`.
        halves: D arrays `[H, L, E]`, where halves are asked for; of a later or an earlier interval than the
            counts, if a source had rows of one half only.
        losses: D means in nats.

    """

    sources: tuple[str, ...]
    counts: tuple[Counts | None, ...]
    halves: tuple[Counts | None, ...]
    losses: tuple[float | None, ...]

    @classmethod
    def nothing(cls, sources: Sequence[str]) -> "LastKnown":
        """Return what is known before anything was measured: nothing."""
        none = (None,) * len(sources)
        return cls(tuple(sources), none, none, none)

    def fill_counts(self, signal: Signal) -> tuple["LastKnown", Signal, Filled]:
        """Remember the counts of the sources that have tokens, and complete the signal where there are none.

        Returns:
            What is known now; the signal, with 0 for sources that were never measured; who was not measured.

        Raises:
            ValueError: no counts, the wrong shape, or a negative, NaN or infinite one. Nothing is remembered.

        """
        counts_DLE = self._checked_counts(signal)
        measured_D = self._totals(counts_DLE) > 0
        known = self._updated(self.counts, counts_DLE, measured_D, "counts")
        if not measured_D.all():
            signal = replace(signal, counts_DLE=_stacked(known, counts_DLE[0], axis=0))
        return replace(self, counts=known), signal, self._filled(measured_D, known)

    def fill_halves(self, signal: Signal) -> tuple["LastKnown", Signal, Filled]:
        """Do the same for the halves of sources with tokens in both: one alone does not tell the noise."""
        halves_HDLE = self._checked_halves(signal)
        measured_D = np.all([self._totals(half_DLE) > 0 for half_DLE in halves_HDLE], axis=0)
        known = self._updated(self.halves, halves_HDLE.swapaxes(0, 1), measured_D, "halves of counts")
        if not measured_D.all():
            signal = replace(signal, half_counts_HDLE=_stacked(known, halves_HDLE[:, 0], axis=1))
        return replace(self, halves=known), signal, self._filled(measured_D, known)

    def fill_losses(self, signal: Signal) -> tuple["LastKnown", Signal, Filled]:
        """Do the same for losses, where NaN says that nothing of a source was trained on.

        Raises:
            ValueError: no losses, not one per source, or an infinite one.

        """
        if signal.loss_D is None:
            raise ValueError("a loss per source is needed; the signal holds none")
        loss_D = np.asarray(signal.loss_D, dtype=np.float64)
        if loss_D.shape != (len(self.sources),):
            raise ValueError(
                f"losses have shape {loss_D.shape}; give one for each of {len(self.sources)} sources"
            )
        for name, loss in zip(self.sources, loss_D, strict=True):
            if np.isinf(loss):
                raise ValueError(f"the loss of source {name!r} is {loss}; it must be finite, or NaN for none")
        measured_D = ~np.isnan(loss_D)
        known = tuple(
            float(loss) if measured else old
            for loss, measured, old in zip(loss_D, measured_D, self.losses, strict=True)
        )
        filled_D = np.array([np.nan if loss is None else loss for loss in known])
        return replace(self, losses=known), replace(signal, loss_D=filled_D), self._filled(measured_D, known)

    def _checked_counts(self, signal: Signal) -> Counts:
        counts_DLE = signal.counts_DLE
        if counts_DLE is None:
            raise ValueError("token counts per expert are needed; the signal holds none")
        if counts_DLE.ndim != 3 or len(counts_DLE) != len(self.sources):
            raise ValueError(
                f"counts have shape {counts_DLE.shape}; give [{len(self.sources)} sources, layers, experts]"
            )
        return counts_DLE

    def _checked_halves(self, signal: Signal) -> Counts:
        counts_DLE = self._checked_counts(signal)
        halves_HDLE = signal.half_counts_HDLE
        if halves_HDLE is None:
            raise ValueError(
                "token counts in two halves are needed to tell their noise; the signal holds none"
            )
        if halves_HDLE.shape != (NUM_HALVES, *counts_DLE.shape):
            raise ValueError(
                f"halves of counts have shape {halves_HDLE.shape}; need {(NUM_HALVES, *counts_DLE.shape)}"
            )
        return halves_HDLE

    def _totals(self, counts_DLE: Counts) -> Floats:
        """Return the tokens of each source, after every count was found to be one.

        This comes before remembering: a broken row must not wait in the state until its source is needed.
        """
        total_D = np.asarray(counts_DLE.sum(axis=(1, 2)), dtype=np.float64)
        if counts_DLE.min(initial=0) < 0 or not np.isfinite(total_D).all():
            for name, counts_LE in zip(self.sources, counts_DLE, strict=True):
                if not np.isfinite(counts_LE).all() or (counts_LE < 0).any():
                    raise ValueError(
                        f"source {name!r} has a negative, NaN or infinite token count: {counts_LE.tolist()}"
                    )
        return total_D

    def _updated(
        self, olds: Sequence[Counts | None], news: Counts, measured_D: NDArray[np.bool_], what: str
    ) -> tuple[Counts | None, ...]:
        for name, old, measured in zip(self.sources, olds, measured_D, strict=True):
            if old is not None and not measured and old.shape != news.shape[1:]:
                raise ValueError(
                    f"last known {what} of source {name!r} have shape {old.shape}, the signal has "
                    f"{news.shape[1:]}; resume with the same model"
                )
        return tuple(
            new.copy() if measured else old for new, old, measured in zip(news, olds, measured_D, strict=True)
        )

    def _filled(self, measured_D: NDArray[np.bool_], known: Sequence[object]) -> Filled:
        rows = list(zip(self.sources, measured_D, known, strict=True))
        return Filled(
            stand_ins=tuple(name for name, measured, value in rows if not measured and value is not None),
            unknown=tuple(name for name, _, value in rows if value is None),
        )

    def with_sources(self, sources: Sequence[str], old_index_D: Sequence[int | None]) -> "LastKnown":
        """Return what is known of other sources, each being the old one of that index, or new."""

        def moved(old_D: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(None if old is None else old_D[old] for old in old_index_D)

        return LastKnown(tuple(sources), moved(self.counts), moved(self.halves), moved(self.losses))

    def to_json(self) -> dict[str, Any]:
        """Return all of it in JSON types; reading it gives the same bits back."""
        return {
            "last_counts": [None if counts is None else counts.tolist() for counts in self.counts],
            "last_halves": [None if halves is None else halves.tolist() for halves in self.halves],
            "last_losses": list(self.losses),
        }

    @classmethod
    def from_json(cls, sources: Sequence[str], record: Mapping[str, Any]) -> "LastKnown":
        """Read what `to_json` gave.

        Raises:
            ValueError: it is of another number of sources.

        """
        for key in ("last_counts", "last_halves", "last_losses"):
            if len(record[key]) != len(sources):
                raise ValueError(
                    f"the saved mix has {key} of {len(record[key])} sources; need {len(sources)}"
                )
        return cls(
            tuple(sources),
            counts=tuple(None if counts is None else np.array(counts) for counts in record["last_counts"]),
            halves=tuple(None if halves is None else np.array(halves) for halves in record["last_halves"]),
            losses=tuple(record["last_losses"]),
        )


def _stacked(known: Sequence[Counts | None], like: Counts, axis: int) -> Counts:
    filled: list[Any] = [np.zeros_like(like) if counts is None else counts for counts in known]
    return np.stack(filled, axis)


TOKENS, HALVES, LOSS = "tokens", "tokens in both halves", "loss"
FILLS = {TOKENS: LastKnown.fill_counts, HALVES: LastKnown.fill_halves, LOSS: LastKnown.fill_losses}
"""What may be needed of every source -> how last known values complete it."""
STAND_INS = {TOKENS: "counts", HALVES: "halves", LOSS: "losses"}


def needs(strategy: Strategy) -> set[str]:
    """Return what must be known of every source for a strategy to update: keys of `FILLS`."""
    if not strategy.updates:
        return set()
    asked = {TOKENS: strategy.needs_gate_load, HALVES: strategy.needs_halves, LOSS: strategy.needs_loss}
    return {what for what, needed in asked.items() if needed}


def waits(strategy: Strategy, unmeasured: Mapping[str, Filled]) -> bool:
    """Tell whether a strategy needs what is not known of a source."""
    return any(unmeasured[what].unknown for what in needs(strategy) & unmeasured.keys())


def matched(signal: Signal) -> tuple[Signal, Signal]:
    """Return the signal for strategies that need the halves, and for others: halves add up to the counts.

    They may be of different intervals where a source had rows of one half only. Those that need the halves
    then get the older counts that belong to them, the others the newer counts alone.
    """
    if signal.half_counts_HDLE is None or signal.counts_DLE is None:
        return signal, signal
    counts_DLE = signal.half_counts_HDLE.sum(axis=0)
    if np.array_equal(counts_DLE, signal.counts_DLE):
        return signal, signal
    return replace(signal, counts_DLE=counts_DLE), replace(signal, half_counts_HDLE=None)
