"""What was measured for an update, as `mixing.jsonl` keeps it: enough to ask every strategy again.

Axes: H halves, D sources, L MoE layers of the model, E experts; C layers that some strategy reads.

The record of one weight update: a line of `mixing.jsonl`, from which `verify` asks the strategies again.

Axes: D sources, L MoE layers that a strategy chose, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.controller import Decision, MixingController, MixingUpdate
from megatron_dynmix.mixing.example_shares import example_shares
from megatron_dynmix.mixing.gate_loads import select_layers
from megatron_dynmix.mixing.override import Override
from megatron_dynmix.mixing.strategy import Remark, Signal, Strategy
from megatron_dynmix.mixing.weights import entropy, kl_divergence

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


KEPT = "weights kept"
"""How the note of an update begins that had to leave the weights as they were."""


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
) -> dict[str, Any]:
    """Plain values of an update.

    Args:
        controller: after the update.
        decision: what it decided; None if it was not asked, and the note says why.
        iteration: iterations done.
        consumed_samples: rows drawn up to then, all sources.
        old_D: shares before.
        new_D: shares after.
        tokens_D: tokens of each source trained on so far.
        rows_D: rows of each source drawn so far.
        size_D: rows of each source.
        seconds: wall time per phase.
        override: the operator's word.
        notes: what must be said beside the controller's own notes.
        probe_loss: mean losses in nats on the held-out rows, None where a source had no trained token.
        examples_per_row_D: of each source, where the strategy's weights are shares of examples.

    """
    proposal = decision.proposal if decision else None
    notes = [*notes, *(decision.notes if decision else ())]
    loss_D = decision.signal.loss_D if decision else None
    record = MixingUpdate(
        iteration=iteration,
        consumed_samples=consumed_samples,
        sources=controller.sources,
        old_weights=old_D,
        new_weights=new_D,
        delta=proposal.delta_D if proposal else None,
        load=_by_layer(proposal.load_DE, decision) if proposal and decision else None,
        distance=proposal.distance_DD if proposal else None,
        tokens=tokens_D,
        rows=rows_D,
        epochs=rows_D / size_D,
        seconds=seconds,
        note="; ".join(note.text for note in notes) or None,
        events=tuple(event.text for event in decision.events) if decision else (),
        override=None if override is None else {"weights": override.weights, "pause": override.pause},
        shadow={name: shadow.weights_D for name, shadow in decision.shadow.items()} if decision else {},
        loss=loss_D,
        delta_error=proposal.delta_error_D if proposal else None,
    ).to_json()
    asked = [controller.strategy, *controller.shadows.values()]
    return {
        **record,
        "signal": decision
        and measured_to_json(decision.signal, [strategy for strategy in asked if strategy.updates]),
        "example_weights": None
        if examples_per_row_D is None
        else example_shares(new_D, examples_per_row_D).tolist(),
        "expert_load": busiest_expert(decision, old_D),
        "probe_loss": probe_loss,
        "entropy": entropy(new_D),
        "kl_step": kl_divergence(new_D, old_D),
    }


def busiest_expert(decision: Decision | None, weights_D: NDArray[np.float64]) -> list[float] | None:
    """Load of the busiest expert over the mean one, by MoE layer, of the mix in force; None if not measured.

    1 is an even load. Sources are weighted as they are drawn: a probe reads equally much of each.
    """
    counts_DLE = None if decision is None else decision.signal.counts_DLE
    if counts_DLE is None or not counts_DLE.any():
        return None
    total_DL1 = counts_DLE.sum(axis=2, keepdims=True)
    load_DLE = counts_DLE / np.maximum(total_DL1, 1)
    mix_LE = np.einsum("d,dle->le", weights_D, load_DLE)
    mean_L = mix_LE.mean(axis=1)
    return (mix_LE.max(axis=1) / np.where(mean_L > 0, mean_L, 1)).tolist()


def _by_layer(load_DE: NDArray[np.float64] | None, decision: Decision) -> NDArray[np.float64] | None:
    """Loads of several layers, which a strategy lays side by side, as `[D, L, E]`."""
    counts_DLE = decision.signal.counts_DLE
    if load_DE is None or counts_DLE is None:
        return load_DE
    num_experts = counts_DLE.shape[2]
    if load_DE.shape[1] == num_experts or load_DE.shape[1] % num_experts:  # one layer, or a user's own loads
        return load_DE
    return load_DE.reshape(len(load_DE), -1, num_experts)
