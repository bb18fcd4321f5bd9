"""The loop: the order of events, and nothing else."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from megatron_dynmix.checkpoint.run_state import Identity, Progress, RunState
from megatron_dynmix.config import RunConfig
from megatron_dynmix.data.loader import BlendLoader
from megatron_dynmix.errors import StoppedOnRequest, TrainingStopped
from megatron_dynmix.job.agreement import on_rank_0
from megatron_dynmix.job.heartbeat import Heartbeat
from megatron_dynmix.job.signals import StopRequest
from megatron_dynmix.model.lr_schedule import set_learning_rate
from megatron_dynmix.records.live_line import LiveLine
from megatron_dynmix.records.logline import mixing_table, source_loss_line, training_line
from megatron_dynmix.records.schema import Why
from megatron_dynmix.records.writer import MetricsWriter
from megatron_dynmix.training.mixed_steps import MixedSteps
from megatron_dynmix.training.reweighting import MixingError
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
    mixed: MixedSteps
    checkpointer: Checkpointer
    writer: MetricsWriter | None
    identity: Identity
    live: LiveLine

    def __post_init__(self) -> None:
        self.say = self.live.say
        self.saving = Saving(self.config, self.checkpointer, self.say)
        set_learning_rate(self.checkpointer.scheduler, self.progress.consumed_samples)
        self._grad_norm = math.nan

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self.mixed.progress

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
        gc.enable()
        self.live.close()
        if self.writer is not None:
            self.writer.close()

    def _train_until(self, total: int, stop: StopRequest, heartbeat: Heartbeat) -> None:
        if self.progress.iteration < total and any_rank(stop.asked, self.run.platform.device):
            self._stop_on_request()
        by_hand = self.config.training.manual_gc_interval
        if by_hand is not None:
            gc.disable()
        while self.progress.iteration < total:
            heartbeat.iteration = self.progress.iteration + 1
            stopping = self.train_step(stop)
            iteration = self.progress.iteration
            self.saving.settle(wait=False)
            if iteration % self.config.logging.log_interval == 0 or iteration == total:
                self._log(total)
            self.reweight()
            if by_hand is not None and iteration % by_hand == 0:
                gc.collect()
            if iteration == total or iteration % (self.config.checkpoint.save_interval or total) == 0:
                self.save(last=iteration == total)
            if stopping and iteration < total:
                self._stop_on_request()

    def train_step(self, stop: StopRequest) -> bool:
        """Train one iteration; return whether any rank is to stop after it."""
        progress, start = self.progress, time.perf_counter()
        num_micro_batches = set_batch_size(self.config, self.mixed.batch_size)
        micro_batches = self.loader.step(
            progress.consumed_samples, num_micro_batches, self.mixed.first_undecided_sample
        )
        # Random numbers of an iteration follow from its number: a resumed run needs no generator state,
        # and whatever was measured in between has drawn none of them.
        seed_iteration(self.config.training.seed, progress.iteration)
        for chunk in self.run.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        before = BeforePass(self.run)
        self.mixed.begin_step()
        stats, finite, stopping = self.run.train(micro_batches, stop=lambda: stop.asked)
        if finite:
            self.saving.trained()
            stepped, grad_norm, _ = self.optimizer.step()
            self._grad_norm = float(grad_norm or 0.0)
            self.mixed.advance(micro_batches, stats, stepped=stepped)
        else:
            before.restore()
            self.mixed.roll_back()
            self._skip(stats.lm_loss)
            self.mixed.advance(micro_batches, None)
        set_learning_rate(self.checkpointer.scheduler, progress.consumed_samples)
        seconds, tokens = time.perf_counter() - start, float(stats.tokens_D.sum())
        self.mixed.interval.seconds += seconds
        self.live.step(stats.lm_loss, tokens / seconds, self.mixed.plan.weights_D)
        return stopping

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
        self._grad_norm = math.nan

    def _log(self, total: int) -> None:
        """Put the log interval on record, and the samples that were trained on in it; begin the next."""
        micro_batches, aux_losses = self.mixed.interval.micro_batches_here, {}
        if micro_batches:  # none if every batch was skipped
            aux_losses = take_aux_losses(self.run.chunks[0].config, micro_batches)
        record, line = self.mixed.close_interval(
            lr=self.optimizer.param_groups[0]["lr"], grad_norm=self._grad_norm, aux_losses=aux_losses
        )
        if self.writer is not None:
            self.writer.training(record)
            self.writer.ledger(line)
        self.say(training_line(record, total, datetime.now()))
        self.say(source_loss_line(record, self.config.logging.log_sources))

    def record_stage(self, why: Why, iteration: int, changes: Sequence[str] = ()) -> None:
        """Put the stage that has just begun on record."""
        if self.writer is not None:
            self.writer.ledger(self.mixed.stage_line(why, iteration, changes))

    def reweight(self) -> None:
        """Update the weights where they are due, and put that on record."""
        try:
            update = self.mixed.reweight()
        except MixingError as error:
            self._stop_without_weights(error)
        if update is None:
            return
        self.record_stage("update", self.progress.iteration)
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
            state = RunState(**vars(self.identity), **vars(self.mixed.state))
            # a checkpoint never knows more than the records
            flush = None if self.writer is None else self.writer.flush
            self.saving.save(state, last=last, before=flush)
        elif last:
            self.saving.settle(wait=True, last=True)
        return folder_of(self.checkpointer.directory, progress.iteration)

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
        if self.mixed.interval.micro_batches_here and self.progress.iteration != self.saving.newest:
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
