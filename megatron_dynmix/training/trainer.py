"""The loop: the order of events, and nothing else.

Axes: D sources.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_dynmix.checkpoint.checkpointer import Checkpointer
from megatron_dynmix.checkpoint.folder import folder_of
from megatron_dynmix.checkpoint.run_state import DrawnState, Identity, LogInterval, Progress, RunState
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.batch_schedule import one_more
from megatron_dynmix.data.loader import BlendLoader
from megatron_dynmix.data.source_set import SourceSet
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.errors import StoppedOnRequest, TrainingStopped
from megatron_dynmix.job.agreement import on_rank_0
from megatron_dynmix.job.heartbeat import Heartbeat
from megatron_dynmix.job.signals import StopRequest
from megatron_dynmix.model.lr_schedule import set_learning_rate
from megatron_dynmix.records.ledger import DrawnSamples, newest_stage
from megatron_dynmix.records.live_line import LiveLine
from megatron_dynmix.records.logline import mixing_table, source_loss_line, training_line
from megatron_dynmix.records.schema import TrainingRecord, Why
from megatron_dynmix.records.writer import MetricsWriter
from megatron_dynmix.training.reweighting import MixingError, Reweighting
from megatron_dynmix.training.saving import Saving
from megatron_dynmix.training.step import (
    MOST_SKIPPED,
    BeforePass,
    PassRunner,
    any_rank,
    set_batch_size,
    take_aux_losses,
)


@dataclass(kw_only=True, eq=False)
class Trainer:
    """Trains one rank's part of the model."""

    config: RunConfig
    run: PassRunner
    optimizer: MegatronOptimizer
    loader: BlendLoader
    reweighting: Reweighting
    checkpointer: Checkpointer
    writer: MetricsWriter | None
    identity: Identity
    progress: Progress
    interval: LogInterval
    drawn: DrawnSamples
    live: LiveLine

    def __post_init__(self) -> None:
        self.say = self.live.say
        self.saving = Saving(self.config, self.checkpointer, self.say)
        self._schedule = self.reweighting.horizon.schedule
        self._batch_size = 0
        set_learning_rate(self.checkpointer.scheduler, self.progress.consumed_samples)
        self._grad_norm = math.nan

    def fit(self, stop: StopRequest, heartbeat: Heartbeat) -> None:
        """Train to the last iteration, or until any rank is asked to stop; write a checkpoint at the end.

        Raises:
            TrainingStopped: the loss, or the new weights, cannot be used.
            StoppedOnRequest: the state is saved.

        """
        total = self.config.training.train_iters
        assert total is not None, "checked before start"
        if self.progress.iteration >= total:
            self.say(f"already at iteration {self.progress.iteration} of {total}: nothing to train")
        try:
            self._train_until(total, stop, heartbeat)
        except BaseException:
            with contextlib.suppress(TrainingStopped):  # what ended the run is what is told
                self._close()
            raise
        self._close()

    def _close(self) -> None:
        self.live.close()
        if self.writer is not None:
            self.writer.close()

    def _train_until(self, total: int, stop: StopRequest, heartbeat: Heartbeat) -> None:
        if self.progress.iteration < total and any_rank(stop.asked, self.run.platform.device):
            self._stop_on_request()
        while self.progress.iteration < total:
            heartbeat.iteration = self.progress.iteration + 1
            stopping = self.train_step(stop)
            iteration = self.progress.iteration
            self.saving.settle(wait=False)
            if iteration % self.config.logging.log_interval == 0 or iteration == total:
                self._log(total)
            if self.reweighting.is_due(iteration):
                self.reweight()
            if iteration == total or iteration % (self.config.checkpoint.save_interval or total) == 0:
                self.save(last=iteration == total)
            if stopping and iteration < total:
                self._stop_on_request()

    def train_step(self, stop: StopRequest) -> bool:
        """Train one iteration; return whether any rank is to stop after it."""
        progress, start = self.progress, time.perf_counter()
        self._batch_size = self._schedule.batch_size(progress.consumed_samples)
        num_micro_batches = set_batch_size(self.config, self._batch_size)
        micro_batches = self.loader.step(
            progress.consumed_samples, num_micro_batches, self._first_undecided_sample()
        )
        # Random numbers of an iteration follow from its number: a resumed run needs no generator state,
        # and whatever was measured in between has drawn none of them.
        seed_iteration(self.config.training.seed, progress.iteration)
        for chunk in self.run.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        counted = self.reweighting.counts_training
        before = BeforePass(self.run)
        with self.run.counter.recording() if counted else contextlib.nullcontext():
            stats, finite, stopping = self.run.train(micro_batches, stop=stop.asked)
        if finite:
            self._step(stats, num_micro_batches)
        else:
            before.restore()
            self._skip(stats.lm_loss)
        self.drawn.fold(micro_batches, progress.consumed_samples)
        progress.iteration += 1
        progress.consumed_samples += self._batch_size
        progress.batches = one_more(progress.batches, self._batch_size)
        set_learning_rate(self.checkpointer.scheduler, progress.consumed_samples)
        seconds, tokens = time.perf_counter() - start, float(stats.tokens_D.sum())
        self.interval.iterations += 1
        self.interval.seconds += seconds
        self.live.step(stats.lm_loss, tokens / seconds, self.reweighting.blend.weights_D)
        return stopping

    def _step(self, stats: SourceStats, num_micro_batches: int) -> None:
        """Change the weights."""
        self.saving.trained()
        stepped, grad_norm, _ = self.optimizer.step()
        self._grad_norm = float(grad_norm or 0.0)
        self.progress.tokens_D += stats.tokens_D
        self.reweighting.observe(stats)
        self.progress.skipped_in_row = 0
        self.interval.stats += stats
        self.interval.samples += self._batch_size
        self.interval.micro_batches_here += num_micro_batches
        self.interval.skipped += not stepped

    def _skip(self, lm_loss: float) -> None:
        """Go on without a batch that is not finite, where that is wanted and has not become the rule."""
        progress = self.progress
        what = (
            f"iteration {progress.iteration + 1} brought a loss of {lm_loss} and gradients that are not all "
            "finite"
        )
        if self.config.training.nonfinite == "stop":
            self._stop(what)
        if progress.skipped_in_row + 1 == MOST_SKIPPED:
            self._stop(f"{what}, like the {progress.skipped_in_row} before it")
        self.say(f" WARNING: {what}: the batch is skipped and changes nothing")
        progress.skipped_in_row += 1
        self._grad_norm = math.nan
        self.interval.skipped += 1

    def _first_undecided_sample(self) -> int:
        """Where the next weight update may change the mix."""
        iterations = self.reweighting.next_due(self.progress.iteration)
        return self._schedule.samples_after(iterations, self.progress.consumed_samples)

    def _log(self, total: int) -> None:
        """Put the log interval on record, and the samples that were trained on in it; begin the next."""
        progress, interval = self.progress, self.interval
        aux_losses = {}
        if interval.micro_batches_here:  # none if every batch was skipped
            aux_losses = take_aux_losses(self.run.chunks[0].config, interval.micro_batches_here)
        sources = self.reweighting.controller.sources
        tokens = float(interval.stats.tokens_D.sum())
        record = TrainingRecord(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            lm_loss=interval.stats.lm_loss,
            source_loss=dict(zip(sources, interval.stats.source_losses(), strict=True)),
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=self._grad_norm,
            global_batch_size=self._batch_size,
            seconds=interval.seconds / interval.iterations,
            tokens_per_second=tokens / interval.seconds,
            useful_token_share=tokens / (max(interval.samples, 1) * self.config.data.seq_length),
            tokens=dict(zip(sources, progress.tokens_D.long().tolist(), strict=True)),
            skipped_iterations=interval.skipped,
            aux_losses=aux_losses,
        )
        if self.writer is not None:
            self.writer.training(record)
        self.say(training_line(record, total, datetime.now()))
        self.say(source_loss_line(record, self.config.logging.log_sources))
        self.interval = LogInterval(SourceStats.zero(len(sources)))
        line = self.drawn.line(progress.iteration, progress.consumed_samples, self.run.platform.device)
        if self.writer is not None:
            self.writer.ledger(line)
        self.drawn = DrawnSamples(progress.consumed_samples, carried=0)

    def record_stage(self, why: Why, iteration: int, changes: Sequence[str] = ()) -> None:
        """Put the stage that has just begun on record."""
        if self.writer is None:
            return
        reweighting = self.reweighting
        sources = SourceSet.of(self.identity.fingerprints, reweighting.blend.sizes_D.tolist())
        line = newest_stage(
            reweighting.blend,
            sources,
            self.config.mixing,
            reweighting.resolved,
            why=why,
            iteration=iteration,
            changes=changes,
            begin=reweighting.begin() if why == "start" else {},
        )
        self.writer.ledger(line)

    def reweight(self) -> None:
        """Update the weights and put that on record."""
        progress = self.progress
        try:
            update = self.reweighting.update(progress.iteration, progress.consumed_samples, progress.tokens_D)
        except MixingError as error:
            self._stop_without_weights(error)
        if update is None:
            return
        self.record_stage("update", progress.iteration)
        if self.writer is not None:
            self.writer.mixing(update)
            self.writer.flush()
            self.say(mixing_table(update, self.config.logging.log_sources))

    def save(self, *, last: bool) -> Path:
        """Write a checkpoint of the state after the last whole iteration, unless there is one.

        If it is the `last` of the run, it is whole when this returns.
        """
        progress, lease = self.progress, self.checkpointer.lease
        if last and lease is not None:
            lease.say_ending()
        if progress.iteration != self.saving.newest:
            # a checkpoint never knows more than the records
            flush = None if self.writer is None else self.writer.flush
            self.saving.save(self._state(), last=last, before=flush)
        elif last:
            self.saving.settle(wait=True, last=True)
        return folder_of(self.checkpointer.directory, progress.iteration)

    def _state(self) -> RunState:
        return RunState(
            **vars(self.identity),
            progress=replace(self.progress),
            mix=self.reweighting.state,
            log_interval=self.interval,
            drawn=DrawnState(
                first_sample=self.drawn.first_sample, digest=self.drawn.digest(self.run.platform.device)
            ),
        )

    def _stop_on_request(self) -> NoReturn:
        """Keep what was trained, and end so that whoever asked can start the run again."""
        self.saving.stop_if_lost()
        text = "stopped on request, before the first iteration"
        if self.progress.iteration:
            saved = self.save(last=True)
            text = f"saved and stopped on request; the state is in {saved}, go on with --resume auto"
        raise StoppedOnRequest(text)

    def _stop_without_weights(self, error: MixingError) -> NoReturn:
        """Keep the state, which nothing is wrong with: the weights in force are the last good ones."""
        why = f"the weights could not be updated after iteration {self.progress.iteration}: {error}"
        try:
            saved = self.save(last=True)
        except TrainingStopped as failure:
            raise TrainingStopped(str(failure) and f"{why}. {failure}") from None
        text = f"{why}. The state is kept in {saved}, and --resume goes on from it with the weights it had"
        text += ". Mend the strategy or its settings first, or give another --strategy"
        raise TrainingStopped(on_rank_0(text))

    def _stop(self, why: str) -> NoReturn:
        """Keep the state, point the run at its last good checkpoint, and end.

        What went wrong has changed no weight, but the step before it may have: good is a checkpoint from
        which an iteration was trained.
        """
        # A checkpoint of this iteration, if there is one, holds the log interval as it was: it stays open.
        if self.interval.micro_batches_here and self.progress.iteration != self.saving.newest:
            self._log(self.config.training.train_iters or 0)
        try:
            text = f"{why}. The state before is kept in {self.save(last=True)}"
            good = self.saving.fall_back(self.progress.iteration)
        except TrainingStopped as failure:
            raise TrainingStopped(str(failure) and f"{why}. {failure}") from None
        if good is not None:
            text += f"; the last checkpoint that trained well is {good}, and --resume goes on from it"
        else:
            text += ", whose weights may be damaged already: no earlier checkpoint was saved"
        text += ". Look at the rows and at the learning rate first"
        raise TrainingStopped(on_rank_0(text))


def seed_iteration(seed: int, iteration: int) -> None:
    """Seed all random generators of this rank for one iteration, the same on all ranks of a pipeline stage.

    Megatron-Core adds offsets for tensor- and expert-parallel ranks to what draws on the device, so that
    their parts differ; the one for pipeline stages is ours. The factors keep seeds, iterations, stages and
    those offsets from meeting. Routers are drawn on the CPU everywhere, by torch's default generator.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mixed = seed * 1_000_003 + (iteration + 1) * 100_003 + stage * 10_007
    mixed %= 2**31
    random.seed(mixed)
    np.random.seed(mixed)
    torch.default_generator.manual_seed(mixed)
    model_parallel_cuda_manual_seed(mixed)
