"""Every m iterations: signal -> reduced counts -> new weights -> next stage of the blend.

Axes: D sources, L MoE layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dynmix.config.tree import MixingConfig
from megatron_dynmix.data.dynamic_blend import DynamicBlendedDataset
from megatron_dynmix.mixing.controller import MixingController, MixingUpdate
from megatron_dynmix.mixing.gate_load import GateLoad
from megatron_dynmix.mixing.static import Fixed, Uniform
from megatron_dynmix.mixing.strategy import Proposal, Signal, Strategy
from megatron_dynmix.mixing.weights import entropy, kl_divergence
from megatron_dynmix.moe.reduction import reduce_counts
from megatron_dynmix.training.probe import Probe
from megatron_dynmix.training.step import PassRunner, SourceStats


class MixingError(RuntimeError):
    """New weights could not be made; the last good ones stay in force."""


def build_strategy(mixing: MixingConfig) -> Strategy:
    """The configured rule.

    Raises:
        ValueError: a value out of range.

    """
    match mixing.strategy:
        case "gate-load":
            return GateLoad(
                eta=mixing.eta,
                smoothing=mixing.smoothing,
                metric=mixing.metric,
                aggregate=mixing.aggregate,
                layers=mixing.layers,
            )
        case "uniform":
            return Uniform()
        case "fixed":
            return Fixed()
    raise AssertionError(f"unknown strategy {mixing.strategy}")


class Reweighting:
    """The part of a run that changes its mix; the same object on every rank, deciding on rank 0."""

    def __init__(
        self,
        mixing: MixingConfig,
        controller: MixingController,
        blend: DynamicBlendedDataset,
        run: PassRunner,
        probe: Probe | None,
    ) -> None:
        self.mixing = mixing
        self.controller = controller
        self.blend = blend
        self.run = run
        self.probe = probe
        self._carried_LDE = torch.zeros_like(run.counter.counts_LDE, device="cpu")

    @property
    def counts_training(self) -> bool:
        """Whether training passes are to be counted."""
        return self.controller.strategy.needs_gate_load and self.mixing.signal == "train"

    def next_due(self, iteration: int) -> int | None:
        """Iterations from this one to the next update; None if the weights never change."""
        if not self.controller.strategy.updates:
            return None
        return self.mixing.interval - iteration % self.mixing.interval

    def is_due(self, iteration: int) -> bool:
        """Whether the weights change after this iteration."""
        return self.controller.strategy.updates and iteration % self.mixing.interval == 0

    def update(self, iteration: int, consumed_samples: int, tokens_D: torch.Tensor) -> dict[str, Any]:
        """Measure, decide on rank 0, tell everybody, append the stage.

        Args:
            iteration: iterations done.
            consumed_samples: global samples they drew.
            tokens_D: tokens of each source trained on so far.

        Returns:
            The record of the update; on other ranks than 0 without what only rank 0 knows.

        Raises:
            MixingError: on every rank, if the signal or the new weights cannot be used.

        """
        seconds: dict[str, float] = {}
        with self._timed(seconds, "signal"):
            counts_LDE, probe_stats = self._measure(seconds)
        old_D = self.blend.weights_D
        with self._timed(seconds, "update"):
            new_D, proposal, note = self._decide(counts_LDE, probe_stats)
        with self._timed(seconds, "rebuild"):
            self.blend.append_stage(consumed_samples, new_D)
        seconds["signal"] -= seconds["reduce"]
        rows_D = self.blend.drawn_D(consumed_samples)
        record = MixingUpdate(
            iteration=iteration,
            consumed_samples=consumed_samples,
            sources=self.controller.sources,
            old_weights=old_D,
            new_weights=new_D,
            delta=proposal.delta_D if proposal else None,
            load=self._by_layer(proposal.load_DE) if proposal else None,
            distance=proposal.distance_DD if proposal else None,
            tokens=tokens_D.long().numpy(),
            rows=rows_D,
            epochs=rows_D / self.blend.sizes_D,
            seconds=seconds,
            note=note,
        ).to_json()
        return {
            **record,
            "probe_loss": probe_stats.source_losses() if probe_stats else None,
            "entropy": entropy(new_D),
            "kl_step": kl_divergence(new_D, old_D),
        }

    def _measure(self, seconds: dict[str, float]) -> tuple[torch.Tensor, SourceStats | None]:
        if self.probe is not None:
            return self.probe.measure(self.run, seconds)
        with self._timed(seconds, "reduce"):
            counts_LDE = reduce_counts(self.run.counter.take()).cpu() + self._carried_LDE
        self._carried_LDE.zero_()
        return counts_LDE, None

    def _decide(
        self, counts_LDE: torch.Tensor, probe_stats: SourceStats | None
    ) -> tuple[NDArray[np.float64], Proposal | None, str | None]:
        """Weights, on every rank the same bits; the proposal and a note on rank 0."""
        device = self.run.platform.device
        weights_D = torch.full((len(self.controller.sources),), torch.nan, dtype=torch.float64, device=device)
        proposal, note, failure = None, None, None
        if torch.distributed.get_rank() == 0:
            counts_DLE = counts_LDE.transpose(0, 1).contiguous().numpy()
            losses = probe_stats.source_losses() if probe_stats else None
            loss_D = None if losses is None else np.array(losses, dtype=np.float64)
            try:
                proposal, note = self.controller.update(Signal(counts_DLE=counts_DLE, loss_D=loss_D))
                weights_D.copy_(torch.from_numpy(self.controller.weights_D.copy()))
            except Exception as error:  # whatever it is, the other ranks are waiting to be told
                failure = str(error)
        torch.distributed.broadcast(weights_D, src=0)  # NaN says: rank 0 could not decide
        if weights_D.isnan().any():
            raise MixingError(failure or "rank 0 could not make new weights; its message says why")
        return weights_D.cpu().numpy(), proposal, note

    def _by_layer(self, load_DE: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        """Loads of several layers, which a strategy lays side by side, as `[D, L, E]` for the record."""
        num_experts = self.run.counter.counts_LDE.shape[2]
        if load_DE is None or load_DE.shape[1] == num_experts:
            return load_DE
        return load_DE.reshape(len(load_DE), -1, num_experts)

    @contextmanager
    def _timed(self, seconds: dict[str, float], phase: str) -> Iterator[None]:
        self.run.platform.synchronize()
        start = time.perf_counter()
        yield
        self.run.platform.synchronize()
        seconds[phase] = time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """Blend, controller and the counts of the running interval, summed over all ranks."""
        counts_LDE = self._carried_LDE + reduce_counts(self.run.counter.counts_LDE).cpu()
        return {
            "blend": self.blend.state_dict(),
            "controller": self.controller.state_dict(),
            "interval_counts": counts_LDE.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the interval's counts so far are added to what this run will count."""
        self.blend.load_state_dict(state["blend"])
        self.controller.load_state_dict(state["controller"])
        self._carried_LDE = torch.tensor(state["interval_counts"], dtype=torch.int64)
