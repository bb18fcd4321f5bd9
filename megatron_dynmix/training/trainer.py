"""The loop: the order of events, and nothing else.

Axes: D sources.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_dynmix.config import RunConfig
from megatron_dynmix.data.loader import BlendLoader
from megatron_dynmix.monitor.logline import (
    mixing_table,
    saved_line,
    saving_line,
    source_loss_line,
    training_line,
)
from megatron_dynmix.monitor.metrics import MetricsWriter
from megatron_dynmix.training.aux_losses import take_aux_losses
from megatron_dynmix.training.checkpoint import Checkpointer
from megatron_dynmix.training.reweighting import MixingError, Reweighting
from megatron_dynmix.training.step import PassRunner, SourceStats, gradients_are_finite


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and which checkpoint holds the last good state."""


@dataclass
class Progress:
    """How far a run has come: the loop's part of the run state."""

    iteration: int
    consumed_samples: int
    tokens_D: torch.Tensor
    """Tokens of each source trained on so far, float64 (exact)."""


@dataclass
class LogInterval:
    """What was seen since the last log line; part of the run state, so that no iteration goes unrecorded."""

    stats: SourceStats
    iterations: int = 0
    iterations_here: int = 0
    """Those of this process: Megatron-Core's own trackers do not survive a restart."""
    seconds: float = 0.0
    skipped: int = 0

    @classmethod
    def start(cls, num_sources: int) -> LogInterval:
        """Nothing seen yet."""
        return cls(SourceStats.zero(num_sources))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, exact."""
        sums = (self.stats.loss_sum_D, self.stats.trained_D, self.stats.tokens_D)
        return {
            "stats": [sum_D.tolist() for sum_D in sums],
            "iterations": self.iterations,
            "seconds": self.seconds,
            "skipped": self.skipped,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> LogInterval:
        """Go on from `state`."""
        stats = SourceStats(*torch.tensor(state["stats"], dtype=torch.float64))
        return cls(stats, state["iterations"], 0, state["seconds"], state["skipped"])


class Trainer:
    """Trains one rank's part of the model."""

    def __init__(
        self,
        *,
        config: RunConfig,
        run: PassRunner,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        loader: BlendLoader,
        reweighting: Reweighting,
        checkpointer: Checkpointer,
        writer: MetricsWriter | None,
        identity: dict[str, Any],
        progress: Progress,
        interval: LogInterval,
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.run = run
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loader = loader
        self.reweighting = reweighting
        self.checkpointer = checkpointer
        self.writer = writer
        self.identity = identity
        self.progress = progress
        self._interval = interval
        self.say = say
        self._saved_iteration = progress.iteration if progress.iteration else None
        self._good_checkpoint: int | None = None

    def fit(self) -> None:
        """Train to the last iteration; a checkpoint is written at the end.

        Raises:
            TrainingStopped: the loss, or the new weights, cannot be used.

        """
        total = self.config.training.train_iters
        assert total is not None, "checked before start"
        if self.progress.iteration >= total:
            self.say(f"already at iteration {self.progress.iteration} of {total}: nothing to train")
        while self.progress.iteration < total:
            self._train_step()
            iteration = self.progress.iteration
            if iteration % self.config.logging.log_interval == 0 or iteration == total:
                self._log(total)
            if self.reweighting.is_due(iteration):
                self._reweight()
            if iteration == total or iteration % (self.config.checkpoint.save_interval or total) == 0:
                self.save()
        if self.writer is not None:
            self.writer.close()

    def _train_step(self) -> None:
        progress, batch_size = self.progress, self.config.training.global_batch_size
        assert batch_size is not None, "checked before start"
        start = time.perf_counter()
        micro_batches = self.loader.step(progress.consumed_samples, get_num_microbatches())
        # Random numbers of an iteration follow from its number: a resumed run needs no generator state,
        # and whatever was measured in between has drawn none of them.
        seed_iteration(self.config.training.seed, progress.iteration)
        self.run.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        counted = self.reweighting.counts_training
        counts_before = self.run.counter.counts_LDE.clone() if counted else None
        with self.run.counter.recording() if counted else contextlib.nullcontext():
            stats = self.run(micro_batches, forward_only=False)
        if not (stats.loss_sum_D.isfinite().all() and gradients_are_finite(self.run.model)):
            if counts_before is not None:
                self.run.counter.counts_LDE.copy_(counts_before)
            self._stop(
                f"iteration {progress.iteration + 1} brought a loss of {stats.lm_loss} and gradients that "
                "are not all finite"
            )
        self._good_checkpoint = self._saved_iteration
        stepped, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=batch_size)
        progress.iteration += 1
        progress.consumed_samples += batch_size
        progress.tokens_D += stats.tokens_D
        self._interval.stats += stats
        self._interval.iterations += 1
        self._interval.iterations_here += 1
        self._interval.seconds += time.perf_counter() - start
        self._interval.skipped += not stepped
        self._grad_norm = float(grad_norm or 0.0)

    def _log(self, total: int) -> None:
        progress, batch_size = self.progress, self.config.training.global_batch_size
        interval, iterations = self._interval, self._interval.iterations
        aux_losses = take_aux_losses(self.run.model, interval.iterations_here * get_num_microbatches())
        sources = self.reweighting.controller.sources
        tokens = float(interval.stats.tokens_D.sum())
        assert batch_size is not None, "checked before start"
        record: dict[str, Any] = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "lm_loss": interval.stats.lm_loss,
            "source_loss": dict(zip(sources, interval.stats.source_losses(), strict=True)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": self._grad_norm,
            "global_batch_size": batch_size,
            "seconds": interval.seconds / iterations,
            "tokens_per_second": tokens / interval.seconds,
            "useful_token_share": tokens / (iterations * batch_size * self.config.data.seq_length),
            "tokens": dict(zip(sources, progress.tokens_D.long().tolist(), strict=True)),
            "skipped_iterations": interval.skipped,
            "aux_losses": aux_losses,
        }
        if self.writer is not None:
            self.writer.training(record)
        self.say(training_line(record, total, datetime.now()))
        self.say(source_loss_line(record))
        self._interval = LogInterval.start(len(sources))

    def _reweight(self) -> None:
        progress = self.progress
        try:
            update = self.reweighting.update(progress.iteration, progress.consumed_samples, progress.tokens_D)
        except MixingError as error:
            self._stop(f"the weights could not be updated after iteration {progress.iteration}: {error}")
        if self.writer is not None:
            self.writer.mixing(update)
            self.writer.flush()
        self.say(mixing_table(update))

    def save(self) -> Path:
        """Write a checkpoint of the state after the last whole iteration, unless there is one."""
        progress, directory = self.progress, self.checkpointer.directory
        target = directory / f"iter_{progress.iteration:07d}"
        if progress.iteration == self._saved_iteration:
            return target
        self.say(saving_line(progress.iteration, directory, datetime.now()))
        state = {
            **self.identity,
            "consumed_samples": progress.consumed_samples,
            "tokens": progress.tokens_D.tolist(),
            "mixing": self.reweighting.state_dict(),
            "log_interval": self._interval.state_dict(),
        }
        self.checkpointer.save(progress.iteration, state)
        size = self.config.parallel.size
        self.say(
            saved_line(
                progress.iteration,
                directory,
                datetime.now(),
                tp_size=size("tensor_model_parallel_size"),
                pp_size=size("pipeline_model_parallel_size"),
            )
        )
        self._saved_iteration = progress.iteration
        return target

    def _stop(self, why: str) -> NoReturn:
        """Keep the state, point the run at its last good checkpoint, and end.

        What went wrong has changed no weight, but the step before it may have: good is a checkpoint from
        which an iteration was trained.
        """
        if self._interval.iterations_here:
            self._log(self.config.training.train_iters or 0)
        before = self.save()
        text = f"{why}. The state before is kept in {before}"
        if self._good_checkpoint not in (None, self.progress.iteration):
            good = self.checkpointer.point_at(self._good_checkpoint)
            text += f"; the last checkpoint that trained well is {good}, and --resume goes on from it"
        else:
            text += ", whose weights may be damaged already: no earlier checkpoint was saved"
        if self.writer is not None:
            self.writer.close()
        raise TrainingStopped(f"{text}. Look at the rows and at the learning rate first")


def seed_iteration(seed: int, iteration: int) -> None:
    """Seed all random generators of this rank for one iteration.

    Megatron-Core adds offsets for tensor- and expert-parallel ranks; the one for pipeline stages is ours.
    The factors keep seeds, iterations, stages and those offsets from meeting.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mixed = seed * 1_000_003 + (iteration + 1) * 100_003 + stage * 10_007
    model_parallel_cuda_manual_seed(mixed % 2**31)
