"""What was measured for an update, as `mixing.jsonl` keeps it: enough to ask every strategy again.

Axes: H halves, D sources, L MoE layers of the model, E experts; C layers that some strategy reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from megatron_dynmix.mixing.gate_loads import select_layers
from megatron_dynmix.mixing.strategy import Signal, Strategy

TOLD = ("train_iters", "interval_rows", "run_rows")
"""Parts of a signal that only its own record tells, 0 where it does not; the others stand in the ledger."""


def layers_read(strategies: Iterable[Strategy], num_layers: int) -> list[int]:
    """The MoE layers whose loads any of the strategies reads; all, for one that does not say which."""
    read: set[int] = set()
    for strategy in strategies:
        if strategy.needs_gate_load:
            read.update(select_layers(getattr(strategy, "layers", "all"), num_layers))
    return sorted(read)


def measured_to_json(signal: Signal, strategies: Iterable[Strategy]) -> dict[str, Any]:
    """Plain values of a signal as the strategies saw it, last known values filled in.

    Counts that are the sum of their halves are not written beside them.
    """
    record: dict[str, Any] = {name: getattr(signal, name) for name in TOLD}
    if signal.loss_D is not None:
        record["loss"] = signal.loss_D.tolist()
    counts_DLE = signal.counts_DLE
    if counts_DLE is None or not (layers := layers_read(strategies, counts_DLE.shape[1])):
        return record
    record |= {"num_layers": counts_DLE.shape[1], "layers": layers}
    halves_HDLE = signal.half_counts_HDLE
    if halves_HDLE is not None:
        record["half_counts"] = halves_HDLE[:, :, layers].tolist()
    if halves_HDLE is None or not np.array_equal(halves_HDLE.sum(axis=0), counts_DLE):
        record["counts"] = counts_DLE[:, layers].tolist()
    return record


def measured_from_json(record: Mapping[str, Any], **told: Any) -> Signal:
    """The signal again; layers that nobody reads are 0.

    Args:
        record: what `measured_to_json` wrote.
        told: parts of the signal that the ledger tells.

    Raises:
        KeyError, TypeError, ValueError: a record that was not written so.

    """
    told = {**told, **{name: int(record[name]) for name in TOLD if name in record}}
    if "loss" in record:
        told["loss_D"] = np.array(record["loss"], np.float64)
    if "half_counts" in record:
        told["half_counts_HDLE"] = _all_layers(np.array(record["half_counts"]), record, axis=2)
        told["counts_DLE"] = told["half_counts_HDLE"].sum(axis=0)
    if "counts" in record:
        told["counts_DLE"] = _all_layers(np.array(record["counts"]), record, axis=1)
    return Signal(**told)


def _all_layers(counts_C: np.ndarray, record: Mapping[str, Any], *, axis: int) -> np.ndarray:
    shape = list(counts_C.shape)
    shape[axis] = int(record["num_layers"])
    counts_L = np.zeros(shape, counts_C.dtype)
    counts_L.swapaxes(0, axis)[record["layers"]] = counts_C.swapaxes(0, axis)
    return counts_L
