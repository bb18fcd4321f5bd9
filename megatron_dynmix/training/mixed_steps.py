"""The steps of a run whose mix changes: what each has counted, and how far the run has come.

Axes: H halves, D sources, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_dynmix.checkpoint.run_state import DrawnState, LogInterval, LoopState, Progress
from megatron_dynmix.config.batch_schedule import one_more
from megatron_dynmix.data.blend_plan import BlendPlan
from megatron_dynmix.data.loader import MicroBatch
from megatron_dynmix.data.source_set import Prints, SourceSet
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.moe.counter import GateLoadCounter
from megatron_dynmix.platform import Platform
from megatron_dynmix.records.ledger import DrawnSamples, newest_stage
from megatron_dynmix.records.schema import MixingUpdate, SamplesLine, StageLine, TrainingRecord, Why
from megatron_dynmix.training.mix import Mix
from megatron_dynmix.training.probe import Probe
from megatron_dynmix.training.reweighting import Reweighting, begin_of


class MixedSteps:
    """A run of one model on one rank, step by step; every rank makes the same calls.

    A step is begun, trained by whoever's loop it is, and then counted as done or rolled back. Where it is
    due, `reweight` follows.
    """

    def __init__(
        self,
        mix: Mix,
        plan: BlendPlan,
        *,
        prints: Prints,
        seq_length: int,
        here: Platform,
        override_file: Path | None,
    ) -> None:
        """Begin at sample 0, at the first weights; `count_with` comes before the first step."""
        self.mix, self.plan = mix, plan
        self.sources = list(mix.controller.sources)
        self._prints, self._seq_length, self._here = prints, seq_length, here
        self._override_file = override_file
        self._reweighting: Reweighting | None = None
        self._before_HDLE: torch.Tensor | None = None
        """Counts before the step under way; None between two steps."""
        num_sources = len(self.sources)
        self.progress = Progress(0, 0, torch.zeros(num_sources, dtype=torch.float64))
        self.interval = LogInterval(SourceStats.zero(num_sources))
        self.drawn = DrawnSamples(0, carried=0)

    def count_with(self, counter: GateLoadCounter, probe: Probe | None = None) -> None:
        """Take note of the counter that the routers write into, and of the probe if there is one."""
        self._reweighting = Reweighting(
            self.mix, self.plan, counter, self._here, probe=probe, override_file=self._override_file
        )

    @property
    def reweighting(self) -> Reweighting:
        """What decides."""
        assert self._reweighting is not None, "nothing counts yet"
        return self._reweighting

    @property
    def batch_size(self) -> int:
        """Samples, of all ranks, of the step that comes or is under way."""
        return self.reweighting.horizon.schedule.batch_size(self.progress.consumed_samples)

    @property
    def first_undecided_sample(self) -> int:
        """Where the next weight update may change the mix."""
        iterations = self.reweighting.next_due(self.progress.iteration)
        return self.reweighting.horizon.schedule.samples_after(iterations, self.progress.consumed_samples)

    def begin_step(self) -> None:
        """Count from here on, if training is what is measured; remember what to roll back to."""
        counter = self.reweighting.counter
        self._before_HDLE = counter.counts_HDLE.clone()
        counter.is_recording = self.reweighting.counts_training

    def roll_back(self) -> None:
        """Forget what was counted since the step began."""
        assert self._before_HDLE is not None, "no step was begun"
        self.reweighting.counter.counts_HDLE.copy_(self._before_HDLE)

    def leave_step(self) -> None:
        """Count no more."""
        self.reweighting.counter.is_recording = False
        self._before_HDLE = None

    def advance(
        self, micro_batches: Sequence[MicroBatch], stats: SourceStats | None, *, stepped: bool = True
    ) -> None:
        """Count the step as done, with this rank's micro-batches of it and what they showed.

        `stats` None: nothing of it was trained on, and it was rolled back. Not `stepped`: the optimizer left
        the weights alone.
        """
        self.leave_step()
        progress, interval, size = self.progress, self.interval, self.batch_size
        if stats is None:
            progress.skipped_in_row += 1
        else:
            progress.skipped_in_row = 0
            progress.tokens_D += stats.tokens_D
            self.reweighting.observe(stats)
            interval.stats += stats
            interval.samples += size
            interval.micro_batches_here += len(micro_batches)
        interval.skipped += stats is None or not stepped
        interval.iterations += 1
        self.drawn.fold(micro_batches, progress.consumed_samples)
        progress.iteration += 1
        progress.consumed_samples += size
        progress.batches = one_more(progress.batches, size)

    def reweight(self) -> MixingUpdate | None:
        """Update the weights, if they may change after this iteration; see `Reweighting.update`."""
        progress = self.progress
        if not self.reweighting.is_due(progress.iteration):
            return None
        return self.reweighting.update(progress.iteration, progress.consumed_samples, progress.tokens_D)

    def stage_line(self, why: Why, iteration: int, changes: Sequence[str] = ()) -> StageLine:
        """Return the line of the stage that has just begun, for the ledger."""
        decides = self.reweighting
        return newest_stage(
            self.plan,
            SourceSet.of(self._prints, self.plan.sizes_D.tolist()),
            self.mix.settings,
            self.mix.resolved,
            why=why,
            iteration=iteration,
            changes=changes,
            begin=begin_of(decides.controller, decides.horizon, self.mix.initial_D) if why == "start" else {},
        )

    def close_interval(
        self, *, lr: float, grad_norm: float, aux_losses: Mapping[str, float]
    ) -> tuple[TrainingRecord, SamplesLine]:
        """Return the record of the log interval and the line of its samples; begin the next one."""
        progress, interval = self.progress, self.interval
        tokens = float(interval.stats.tokens_D.sum())
        record = TrainingRecord(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            lm_loss=interval.stats.lm_loss,
            source_loss=dict(zip(self.sources, interval.stats.source_losses(), strict=True)),
            lr=lr,
            grad_norm=grad_norm,
            global_batch_size=progress.batches[-1][1],
            seconds=interval.seconds / interval.iterations,
            tokens_per_second=tokens / interval.seconds,
            useful_token_share=tokens / (max(interval.samples, 1) * self._seq_length),
            tokens=dict(zip(self.sources, progress.tokens_D.long().tolist(), strict=True)),
            skipped_iterations=interval.skipped,
            aux_losses=dict(aux_losses),
        )
        line = self.drawn.line(progress.iteration, progress.consumed_samples, self._here.device)
        self.interval = LogInterval(SourceStats.zero(len(self.sources)))
        self.drawn = DrawnSamples(progress.consumed_samples, carried=0)
        return record, line

    @property
    def state(self) -> LoopState:
        """What a resumed run needs; every rank has to ask for it."""
        return LoopState(
            progress=replace(self.progress),
            mix=self.reweighting.state,
            log_interval=self.interval,
            drawn=DrawnState(
                first_sample=self.drawn.first_sample, digest=self.drawn.digest(self._here.device)
            ),
        )

    def resume(self, state: LoopState) -> None:
        """Continue from a state, on any layout."""
        self.reweighting.resume(state.mix)
        horizon = self.reweighting.horizon
        schedule = replace(horizon.schedule, done=state.progress.batches)
        self.reweighting.horizon = replace(horizon, schedule=schedule)
        self.progress, self.interval = state.progress, state.log_interval
        self.drawn = DrawnSamples(state.drawn.first_sample, carried=state.drawn.digest)
