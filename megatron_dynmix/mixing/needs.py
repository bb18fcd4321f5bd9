"""What a strategy needs to know of every source, and the signal as it is to see it."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from megatron_dynmix.mixing.last_known import Filled, LastKnown
from megatron_dynmix.mixing.strategy import Signal, Strategy

TOKENS, HALVES, LOSS = "tokens", "tokens in both halves", "loss"
FILLS = {TOKENS: LastKnown.fill_counts, HALVES: LastKnown.fill_halves, LOSS: LastKnown.fill_losses}
"""What may be needed of every source -> how last known values stand in for it."""
STAND_INS = {TOKENS: "counts", HALVES: "halves", LOSS: "losses"}


def needs(strategy: Strategy) -> set[str]:
    """What must be known of every source for a strategy to update: keys of `FILLS`."""
    if not strategy.updates:
        return set()
    asked = {
        TOKENS: strategy.needs_gate_load,
        HALVES: getattr(strategy, "needs_halves", False),
        LOSS: strategy.needs_loss,
    }
    return {what for what, needed in asked.items() if needed}


def waits(strategy: Strategy, unmeasured: Mapping[str, Filled]) -> bool:
    """Whether a strategy needs what is not known of a source."""
    return any(unmeasured[what].unknown for what in needs(strategy) & unmeasured.keys())


def matched(signal: Signal) -> tuple[Signal, Signal]:
    """The signal for strategies that need the halves, and for others: with halves that add up to the counts.

    They may be of different intervals where a source had rows of one half only. Those that need the halves
    then get the older counts that belong to them, the others the newer counts alone.
    """
    if signal.half_counts_HDLE is None or signal.counts_DLE is None:
        return signal, signal
    counts_DLE = signal.half_counts_HDLE.sum(axis=0)
    if np.array_equal(counts_DLE, signal.counts_DLE):
        return signal, signal
    return replace(signal, counts_DLE=counts_DLE), replace(signal, half_counts_HDLE=None)
