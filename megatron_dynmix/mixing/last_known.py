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

TOKENS, HALVES, LOSS = "tokens", "tokens in both halves", "loss"
STAND_INS = {TOKENS: "counts", HALVES: "halves", LOSS: "losses"}
"""What may be needed of every source -> what is kept of it."""
PARTS = {TOKENS: "counts_DLE", HALVES: "half_counts_HDLE", LOSS: "loss_D"}
"""The part of a `Signal` that brings it."""


@dataclass(frozen=True)
class Filled:
    """Which sources were not measured in an interval: by something older, or not at all known."""

    stand_ins: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LastKnown:
    """What each source had when it was last measured: for each key of `STAND_INS` D values, None before that.

    Counts are `[L, E]`, halves `[H, L, E]`, losses numbers. Halves are of a later or an earlier interval than
    the counts, if a source had rows of one half only. Those wait in `one_half`, `[H, L, E]`, until the other
    half has some too: a source that has a row an update is measured at every second one.
    """

    sources: tuple[str, ...]
    values: Mapping[str, tuple[NDArray[Any] | None, ...]]
    one_half: tuple[NDArray[Any] | None, ...]

    @classmethod
    def nothing(cls, sources: Sequence[str]) -> "LastKnown":
        """Return what is known before anything was measured: nothing."""
        none = (None,) * len(sources)
        return cls(tuple(sources), dict.fromkeys(STAND_INS, none), none)

    def fill(self, what: str, signal: Signal) -> tuple["LastKnown", Signal, Filled]:
        """Remember what was measured of the sources, and complete the signal for those that were not.

        What was never measured is 0, or a loss of NaN. A signal that is refused leaves nothing behind.
        """
        one_half = self.one_half
        if what == LOSS:
            new_D: NDArray[Any] = self._checked_losses(signal)
            measured_D = ~np.isnan(new_D)
        elif what == TOKENS:
            new_D = self._checked_counts(signal)
            measured_D = self._totals(new_D) > 0
        else:  # a half alone does not tell the noise
            new_D = self._with_one_half(self._checked_halves(signal).swapaxes(0, 1))
            measured_D = (new_D.sum(axis=(2, 3)) > 0).all(axis=1)
            waiting = zip(new_D, measured_D, strict=True)
            one_half = tuple(None if done or not new.any() else new for new, done in waiting)
        known_D = self._updated(what, new_D, measured_D)
        if what == HALVES:
            signal = replace(signal, half_counts_HDLE=new_D.swapaxes(0, 1))
        if not measured_D.all():
            blank = np.full_like(new_D[0], np.nan if what == LOSS else 0)
            filled = [blank if value is None else value for value in known_D]
            part: dict[str, Any] = {PARTS[what]: np.stack(filled, axis=1 if what == HALVES else 0)}
            if what == HALVES:
                before_D = np.array([value is not None for value in known_D]) & ~measured_D
                part["stale_D"] = before_D if signal.stale_D is None else before_D | signal.stale_D
            signal = replace(signal, **part)
        rows = list(zip(self.sources, measured_D, known_D, strict=True))
        unmeasured = Filled(
            stand_ins=tuple(name for name, measured, value in rows if not measured and value is not None),
            unknown=tuple(name for name, _, value in rows if value is None),
        )
        known = replace(self, values={**self.values, what: known_D}, one_half=one_half)
        return known, signal, unmeasured

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

    def _with_one_half(self, halves_DHLE: Counts) -> Counts:
        """Return counts with those that wait for the other half of their source."""
        for half_DLE in halves_DHLE.swapaxes(0, 1):
            self._totals(half_DLE)
        waiting = [0 if held is None else held for held in self.one_half]
        return np.stack([new + held for new, held in zip(halves_DHLE, waiting, strict=True)])

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

    def _checked_losses(self, signal: Signal) -> Floats:
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
        return loss_D

    def _updated(
        self, what: str, new_D: NDArray[Any], measured_D: NDArray[np.bool_]
    ) -> tuple[NDArray[Any] | None, ...]:
        known = []
        for name, old, new, measured in zip(self.sources, self.values[what], new_D, measured_D, strict=True):
            if old is not None and not measured and old.shape != new.shape:
                kept = "halves of counts" if what == HALVES else STAND_INS[what]
                raise ValueError(
                    f"last known {kept} of source {name!r} have shape {old.shape}, the signal has "
                    f"{new.shape}; resume with the same model"
                )
            known.append(np.array(new) if measured else old)
        return tuple(known)

    def with_sources(self, sources: Sequence[str], old_index_D: Sequence[int | None]) -> "LastKnown":
        """Return what is known of other sources, each being the old one of that index, or new."""
        moved = {
            what: tuple(None if old is None else old_D[old] for old in old_index_D)
            for what, old_D in self.values.items()
        }
        one_half = tuple(None if old is None else self.one_half[old] for old in old_index_D)
        return LastKnown(tuple(sources), moved, one_half)

    def to_json(self) -> dict[str, Any]:
        """Return all of it in JSON types; reading it gives the same bits back."""
        parts = {f"last_{kept}": self.values[what] for what, kept in STAND_INS.items()}
        return {
            name: [None if value is None else value.tolist() for value in values]
            for name, values in (parts | {"one_half": self.one_half}).items()
        }

    @classmethod
    def from_json(cls, sources: Sequence[str], record: Mapping[str, Any]) -> "LastKnown":
        """Read what `to_json` gave, if it is of so many sources; a record before 0.1.0 has no `one_half`."""
        values: dict[str, tuple[NDArray[Any] | None, ...]] = {}
        for what, kept in STAND_INS.items():
            saved_D = record[f"last_{kept}"]
            if len(saved_D) != len(sources):
                raise ValueError(
                    f"the saved mix has last_{kept} of {len(saved_D)} sources; need {len(sources)}"
                )
            values[what] = tuple(None if value is None else np.array(value) for value in saved_D)
        one_half = record.get("one_half", [None] * len(sources))
        held = tuple(None if value is None else np.array(value) for value in one_half)
        return cls(tuple(sources), values, held)


def needs(strategy: Strategy) -> set[str]:
    """Return what must be known of every source for a strategy to update: keys of `STAND_INS`."""
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
