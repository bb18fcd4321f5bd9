"""Every m iterations: signal -> reduced counts and losses -> new weights -> next stage of the blend.

Axes: H halves, D sources, L MoE layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dynmix.checkpoint.run_state import MixState
from megatron_dynmix.data.blend_plan import BlendPlan
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.files import parse_json
from megatron_dynmix.mixing.controller import Decision, MixingController
from megatron_dynmix.mixing.guardrails import Override, parse_override
from megatron_dynmix.mixing.strategy import Remark, Signal
from megatron_dynmix.moe.counter import GateLoadCounter, reduce_counts
from megatron_dynmix.platform import Platform
from megatron_dynmix.records.mixing_update import TOLD, update_record
from megatron_dynmix.records.schema import MixingUpdate
from megatron_dynmix.training.mix import Horizon, Mix
from megatron_dynmix.training.mix_setup import Resolved, examples_per_row, for_strategy, in_rows, reason

if TYPE_CHECKING:  # a loop that is not ours has none
    from megatron_dynmix.training.probe import Probe


class MixingError(RuntimeError):
    """New weights could not be made; the last good ones stay in force."""


class BrokenOverride(Exception):
    """The operator's file cannot be used; the message says why."""


def told_by_rank_0(
    weights_D: NDArray[np.float64] | None, num_sources: int, failure: str | None, device: torch.device
) -> NDArray[np.float64] | None:
    """Return rank 0's weights on every rank; None if it has none to tell, MixingError if it failed."""
    said = torch.zeros(1 + num_sources, dtype=torch.float64, device=device)
    if failure is not None:
        said[0] = -1
    elif weights_D is not None:
        said[0] = 1
        said[1:] = torch.from_numpy(weights_D.copy())
    torch.distributed.broadcast(said, src=0)
    if said[0] < 0:
        raise MixingError(failure or "rank 0 could not make new weights; its message says why")
    return said[1:].cpu().numpy() if said[0] else None


def told_first_weights(mix: Mix, device: torch.device) -> NDArray[np.float64]:
    """Return rank 0's first weights on every rank: a strategy of the user's own may choose others on each."""
    first_D = told_by_rank_0(mix.first_D, len(mix.first_D), None, device)
    assert first_D is not None, "there are always first weights"
    return first_D


def read_override(path: Path | None, sources: Sequence[str], resolved: Resolved) -> Override | None:
    """Return what the operator says now, in shares of the rows; None if there is no file."""
    if path is None:
        return None
    try:
        said = parse_override(parse_json(path.read_bytes()), sources)
        if said.weights is None:
            return said
        shares_D = np.array([said.weights.get(name, 0.0) for name in sources])
        shares = zip(sources, in_rows(shares_D, resolved).tolist(), strict=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # nothing that anybody may write into it is to end the run
        raise BrokenOverride(f"{path} cannot be used: {reason(error)}; correct or remove it") from None
    return replace(said, weights={name: share for name, share in shares if name in said.weights})


def begin_of(
    controller: MixingController, horizon: Horizon, initial_D: NDArray[np.float64]
) -> dict[str, Any]:
    """Return what first weights come from beside settings: the shares given, and the horizon if asked for."""
    begin: dict[str, Any] = {"weights": initial_D.tolist()}
    strategies = (controller.strategy, *controller.shadows.values())
    if controller.guardrails.caps or any(strategy.starts for strategy in strategies):
        told = horizon.signal(0, 0, np.zeros_like(horizon.size_D))
        begin |= {name: getattr(told, name) for name in TOLD}
    return begin


class Reweighting:
    """The part of a run that changes its mix; the same object on every rank, deciding on rank 0."""

    def __init__(
        self,
        mix: Mix,
        plan: BlendPlan,
        counter: GateLoadCounter,
        here: Platform,
        *,
        probe: Probe | None = None,
        override_file: Path | None = None,
    ) -> None:
        self.mixing = mix.settings
        self.controller = mix.controller
        self.horizon = mix.horizon
        self.resolved = mix.resolved
        self.plan = plan
        self.counter = counter
        self._here = here
        self.probe = probe
        self._override_file = override_file
        self._overridden = False
        self._carried_HDLE = torch.zeros_like(counter.counts_HDLE, device="cpu")
        self._interval = SourceStats.zero(len(mix.controller.sources))

    @property
    def counts_training(self) -> bool:
        """Whether training passes are to be counted."""
        return self.controller.needs_gate_load and self.mixing.signal == "train"

    def observe(self, stats: SourceStats) -> None:
        """Take note of what a training step saw: the losses of the `train` signal."""
        self._interval += stats

    def next_due(self, iteration: int) -> int:
        """Return the iterations from this one to the next update."""
        return self.mixing.interval - iteration % self.mixing.interval

    def is_due(self, iteration: int) -> bool:
        """Whether the weights may change after this iteration: whatever the strategy, by override."""
        return iteration % self.mixing.interval == 0

    def update(self, iteration: int, consumed_samples: int, tokens_D: torch.Tensor) -> MixingUpdate | None:
        """Measure, decide on rank 0, tell everybody, append the stage.

        Return the record of the update, or None if nothing changes the weights, and the stage goes on; only
        the record of rank 0 tells how it was decided. `tokens_D` were trained on so far. `MixingError` on
        every rank, if the signal or the new weights cannot be used.
        """
        seconds: dict[str, float] = {"reduce": 0.0}
        with self._timed(seconds, "signal"):
            measured, probe_stats = self._measure(seconds, iteration)
        seconds["signal"] -= seconds["reduce"]
        rows_D = self.plan.drawn_D(consumed_samples)
        told = self.horizon.signal(iteration, consumed_samples, rows_D)
        signal, notes = self._without_scarce(replace(told, **measured))
        old_D = self.plan.weights_D
        with self._timed(seconds, "update"):
            new_D, decision, override, notes = self._decide(signal, old_D, notes)
        # not before it was used, or a rule that fails would lose what the interval saw
        self._interval = SourceStats.zero(len(self.controller.sources))
        self._carried_HDLE.zero_()
        self.counter.counts_HDLE.zero_()
        if new_D is None:
            return None
        with self._timed(seconds, "rebuild"):
            self.plan.append_stage(consumed_samples, new_D)
        return update_record(
            self.controller,
            decision,
            iteration=iteration,
            consumed_samples=consumed_samples,
            old_D=old_D,
            new_D=new_D,
            tokens_D=tokens_D.long().numpy(),
            rows_D=rows_D,
            size_D=self.plan.sizes_D,
            seconds=seconds,
            override=override,
            notes=notes,
            probe_loss=probe_stats.source_losses() if probe_stats else None,
            examples_per_row_D=examples_per_row(self.resolved),
        )

    def _measure(
        self, seconds: dict[str, float], iteration: int
    ) -> tuple[dict[str, Any], SourceStats | None]:
        """Measure parts of the signal, counts and losses, on the held-out rows or over the interval."""
        counts_HDLE, probe_stats = None, None
        if self.probe is not None:
            number = iteration // self.mixing.interval
            counts_HDLE, probe_stats = self.probe.measure(seconds, number)
        elif self.counts_training:
            with self._timed(seconds, "reduce"):
                counts_HDLE = self._interval_counts()
            self._check_counted(counts_HDLE)
        losses = (probe_stats or self._interval).source_losses()
        measured: dict[str, Any] = {"loss_D": np.array([np.nan if loss is None else loss for loss in losses])}
        if counts_HDLE is not None and self.controller.needs_gate_load:
            halves_HDLE = self.counter.as_signal(counts_HDLE)
            measured |= {"counts_DLE": halves_HDLE.sum(axis=0), "half_counts_HDLE": halves_HDLE}
            measured["same_rows"] = self.mixing.measures_same_rows
        return measured, probe_stats

    def _check_counted(self, counts_HDLE: torch.Tensor) -> None:
        """Refuse an interval of which a layer has seen nothing, or weights would stay with nobody told."""
        silent = torch.nonzero(counts_HDLE.sum(dim=(0, 1, 3)) == 0).flatten().tolist()
        if silent and self._interval.tokens_D.any():
            raise MixingError(
                f"the routers of MoE layers {silent} (from 0, of {counts_HDLE.shape[2]}) have counted none "
                "of the interval's tokens: something calls them otherwise than as modules, as a wrapper that "
                "is not known here or a CUDA graph does; leave it out, or use a strategy without gate loads"
            )

    def _interval_counts(self) -> torch.Tensor:
        """Return the counts of the running interval so far, of all ranks."""
        return self._carried_HDLE + reduce_counts(self.counter.counts_HDLE).cpu()

    def _without_scarce(self, signal: Signal) -> tuple[Signal, list[Remark]]:
        """Without the sources of which the interval brought too few tokens to tell anything."""
        if self.mixing.signal != "train":
            return signal, []
        tokens_D = self._interval.tokens_D.numpy()
        scarce_D = tokens_D < self.mixing.min_tokens
        some = zip(self.controller.sources, tokens_D, scarce_D, strict=True)
        seen = [f"{name} ({int(tokens)})" for name, tokens, scarce in some if scarce and tokens]
        text = f"fewer than min_tokens {self.mixing.min_tokens}: {', '.join(seen)}"
        assert signal.loss_D is not None, "the losses of an interval are always known"
        signal = replace(signal, loss_D=np.where(scarce_D, np.nan, signal.loss_D))
        if signal.counts_DLE is not None and signal.half_counts_HDLE is not None:
            enough_D11 = ~scarce_D[:, None, None]
            signal = replace(
                signal,
                counts_DLE=signal.counts_DLE * enough_D11,
                half_counts_HDLE=signal.half_counts_HDLE * enough_D11,
            )
        return signal, [Remark("few_tokens", text)] if seen else []

    def _decide(
        self, signal: Signal, old_D: NDArray[np.float64], notes: list[Remark]
    ) -> tuple[NDArray[np.float64] | None, Decision | None, Override | None, list[Remark]]:
        """Return weights, on every rank the same bits (None: no update); the others on rank 0."""
        decision, override, weights_D, failure = None, None, None, None
        if torch.distributed.get_rank() == 0:
            try:
                override = read_override(self._override_file, self.controller.sources, self.resolved)
                if self.controller.updates or override is not None or self._overridden:
                    try:
                        decision = self.controller.update(signal, override)
                    except ValueError as error:
                        if override is None:
                            raise
                        # A pause may leave too few rows under the caps: that is no reason to end the run.
                        decision, override = self.controller.update(signal), None
                        text = f"override not followed: {error}"
                        notes = [*notes, Remark("override_not_followed", text)]
                    weights_D, self._overridden = decision.weights_D, override is not None
            except BrokenOverride as broken:
                weights_D, notes = old_D, [Remark("override_unusable", f"weights kept: {broken}")]
            except Exception as error:  # whatever it is, the other ranks are waiting to be told
                failure = reason(error, self.controller.sources)
        new_D = told_by_rank_0(weights_D, len(self.controller.sources), failure, self._here.device)
        return new_D, decision, override, notes

    @contextmanager
    def _timed(self, seconds: dict[str, float], phase: str) -> Iterator[None]:
        self._here.synchronize()
        start = time.perf_counter()
        yield
        self._here.synchronize()
        seconds[phase] = time.perf_counter() - start

    @property
    def state(self) -> MixState:
        """What a resumed run needs; every rank has to ask for it."""
        return MixState(
            blend=self.plan.state,
            controller=self.controller.state,
            strategy=self.mixing.strategy,
            overridden=self._overridden,
            interval_counts=self._interval_counts().numpy(),
            interval_stats=self._interval,
        )

    def resume(self, state: MixState) -> None:
        """Continue from a state; the interval's counts so far are added to what this run will count."""
        self.plan.resume(state.blend)
        self.controller.resume(for_strategy(state.controller, state.strategy, self.mixing.strategy))
        self._overridden = state.overridden
        self._interval = state.interval_stats
        counts = torch.from_numpy(state.interval_counts)
        self._carried_HDLE = counts.view_as(self._carried_HDLE)  # an empty list has no shape
