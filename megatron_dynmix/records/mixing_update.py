"""The record of a weight update, made from what was decided, and the signal made from it again.

Axes: H halves, D sources, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.controller import Decision, MixingController
from megatron_dynmix.mixing.expert_use import expert_use
from megatron_dynmix.mixing.guardrails import Override
from megatron_dynmix.mixing.strategy import Remark, Signal
from megatron_dynmix.mixing.weights import entropy, example_shares, kl_divergence
from megatron_dynmix.records.schema import Measured, MixingUpdate

TOLD = ("train_iters", "interval_rows", "run_rows")
"""Parts of a signal that only its own record tells, 0 where it does not; the others stand in the ledger."""


def _measured(signal: Signal) -> tuple[Measured, dict[str, NDArray[Any]]]:
    """Return what is kept of a signal as the strategies saw it, last known values filled in, and its counts.

    Counts of all layers, whichever are read: another rule may be asked later what it would have done. Counts
    that are the sum of their halves are not kept beside them.
    """
    counts_DLE, halves_HDLE = signal.counts_DLE, signal.half_counts_HDLE
    counts: dict[str, NDArray[Any]] = {}
    if counts_DLE is not None:
        if halves_HDLE is not None:
            counts["half_counts"] = halves_HDLE
        if halves_HDLE is None or not np.array_equal(halves_HDLE.sum(axis=0), counts_DLE):
            counts["counts"] = counts_DLE
    num_layers = 0 if counts_DLE is None else counts_DLE.shape[1]
    stale = [] if signal.stale_D is None else np.flatnonzero(signal.stale_D).tolist()
    told = {name: getattr(signal, name) for name in TOLD}
    return Measured(**told, num_layers=num_layers, stale=stale), counts


def signal_of(update: MixingUpdate, **told: Any) -> Signal:
    """Return the signal of an update with its arrays again, `told` what the ledger knows.

    ValueError for counts that are not as `_measured` gives them.
    """
    signal = update.signal
    assert signal is not None, "asked of updates with a signal"
    for name, counts in update.counts.items():
        if counts.shape[-2] != signal.num_layers:
            raise ValueError(
                f"{name} are of {counts.shape[-2]} layers, the model has {signal.num_layers}: an earlier "
                "version kept those only that were read"
            )
    told |= {name: getattr(signal, name) for name in TOLD}
    if update.loss is not None:
        told["loss_D"] = np.array(update.loss, np.float64)
    halves_HDLE, counts_DLE = update.counts.get("half_counts"), update.counts.get("counts")
    if halves_HDLE is not None:
        told["half_counts_HDLE"], told["counts_DLE"] = halves_HDLE, halves_HDLE.sum(axis=0)
    if counts_DLE is not None:
        told["counts_DLE"] = counts_DLE
    if signal.stale:
        told["stale_D"] = np.isin(np.arange(len(update.sources)), signal.stale)
    return Signal(**told)


def update_record(
    controller: MixingController,
    decision: Decision | None,
    *,
    iteration: int,
    consumed_samples: int,
    old_D: NDArray[np.float64],
    new_D: NDArray[np.float64],
    tokens_D: NDArray[np.int64],
    rows_D: NDArray[np.int64],
    size_D: NDArray[np.int64],
    seconds: Mapping[str, float],
    override: Override | None = None,
    notes: Sequence[Remark] = (),
    probe_loss: list[float | None] | None = None,
    examples_per_row_D: NDArray[np.float64] | None = None,
) -> MixingUpdate:
    """Return the record of an update.

    `decision` is None if the controller was not asked, and a note says why. `old_D` and `new_D` are shares of
    the rows; `tokens_D` and `rows_D` were trained on, and drawn, so far; `size_D` are the rows of an epoch;
    `notes` are said beside the controller's own. With `examples_per_row_D` the strategy's weights are shares
    of examples.
    """
    return MixingUpdate(
        iteration=iteration,
        consumed_samples=consumed_samples,
        sources=list(controller.sources),
        old_weights=old_D.tolist(),
        new_weights=new_D.tolist(),
        tokens=tokens_D.tolist(),
        rows=rows_D.tolist(),
        epochs=(rows_D / size_D).tolist(),
        seconds=dict(seconds),
        notes=[*notes, *(decision.notes if decision else ())],
        override=override,
        example_weights=None
        if examples_per_row_D is None
        else example_shares(new_D, examples_per_row_D).tolist(),
        probe_loss=probe_loss,
        entropy=entropy(new_D),
        kl_step=kl_divergence(new_D, old_D),
        **({} if decision is None else _decided(decision, old_D)),
    )


def _decided(decision: Decision, old_D: NDArray[np.float64]) -> dict[str, Any]:
    """Return the fields that only an update has for which the strategies were asked."""
    proposal, signal = decision.proposal, decision.signal
    load_DLE = proposal.load_DLE
    told, counts = _measured(signal)
    return {
        "delta": proposal.delta_D.tolist(),
        "delta_error": None if proposal.delta_error_D is None else proposal.delta_error_D.tolist(),
        # without the axis of layers where there is one layer
        "load": load_DLE[:, 0] if load_DLE is not None and load_DLE.shape[1] == 1 else load_DLE,
        "distance": proposal.distance_DD,
        "events": list(decision.events),
        "shadow": {name: shadow.weights_D.tolist() for name, shadow in decision.shadow.items()},
        "loss": None if signal.loss_D is None else signal.loss_D.tolist(),
        "signal": told,
        "counts": counts,
        "expert_use": None if signal.counts_DLE is None else expert_use(signal.counts_DLE, old_D),
    }
