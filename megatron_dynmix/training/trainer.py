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
from typing import Any

import torch
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
from megatron_dynmix.training.step import PassRunner, SourceStats


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and which checkpoint holds the last good state."""


@dataclass
class Progress:
    """How far a run has come: the loop's part of the run state."""

    iteration: int
    consumed_samples: int
    tokens_D: torch.Tensor
    """Tokens of each source trained on so far, float64 (exact)."""


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
        progress: Progress,
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
        self.progress = progress
        self.say = say
        self._saved_iteration = progress.iteration
        self._start_log_interval()

    def fit(self) -> None:
        """Train to the last iteration; a checkpoint is written at the end.

        Raises:
            TrainingStopped: the loss, or the new weights, cannot be used.

        """
        total = self.config.training.train_iters
        assert total is not None, "checked before start"
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
        # Random numbers of an iteration follow from its number: a resumed run needs no generator state,
        # and whatever was measured in between has drawn none of them.
        seed_iteration(self.config.training.seed, progress.iteration)
        micro_batches = self.loader.step(progress.consumed_samples, get_num_microbatches())
        self.run.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        counted = self.reweighting.counts_training
        counts_before = self.run.counter.counts_LDE.clone()
        with self.run.counter.recording() if counted else contextlib.nullcontext():
            stats = self.run(micro_batches, forward_only=False)
        if not stats.loss_sum_D.isfinite().all():
            self.run.counter.counts_LDE.copy_(counts_before)
            self._stop(f"the loss of iteration {progress.iteration + 1} is {stats.lm_loss}")
        stepped, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=batch_size)
        progress.iteration += 1
        progress.consumed_samples += batch_size
        progress.tokens_D += stats.tokens_D
        self._stats += stats
        self._seconds += time.perf_counter() - start
        self._skipped += not stepped
        self._grad_norm = float(grad_norm or 0.0)

    def _start_log_interval(self) -> None:
        self._stats = SourceStats.zero(len(self.progress.tokens_D))
        self._seconds, self._skipped, self._since = 0.0, 0, self.progress.iteration

    def _log(self, total: int) -> None:
        progress, batch_size = self.progress, self.config.training.global_batch_size
        iterations = progress.iteration - self._since
        aux_losses = take_aux_losses(self.run.model, iterations * get_num_microbatches())
        sources = self.reweighting.controller.sources
        tokens = float(self._stats.tokens_D.sum())
        assert batch_size is not None, "checked before start"
        record: dict[str, Any] = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "lm_loss": self._stats.lm_loss,
            "source_loss": dict(zip(sources, self._stats.source_losses(), strict=True)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": self._grad_norm,
            "global_batch_size": batch_size,
            "seconds": self._seconds / iterations,
            "tokens_per_second": tokens / self._seconds,
            "useful_token_share": tokens / (iterations * batch_size * self.config.data.seq_length),
            "tokens": dict(zip(sources, progress.tokens_D.long().tolist(), strict=True)),
            "skipped_iterations": self._skipped,
            "aux_losses": aux_losses,
        }
        if self.writer is not None:
            self.writer.training(record)
        self.say(training_line(record, total, datetime.now()))
        self.say(source_loss_line(record))
        self._start_log_interval()

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
            "consumed_samples": progress.consumed_samples,
            "tokens": progress.tokens_D.tolist(),
            "mixing": self.reweighting.state_dict(),
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

    def _stop(self, why: str) -> None:
        """Keep the last good state and end the run. No weight has been changed by what went wrong."""
        good = self.save()
        if self.writer is not None:
            self.writer.close()
        raise TrainingStopped(
            f"{why}. The state after iteration {self.progress.iteration} is kept in {good}; look at the "
            "rows and the learning rate before going on from it with --resume must"
        )


def seed_iteration(seed: int, iteration: int) -> None:
    """Seed all random generators of this rank for one iteration, as Megatron-Core spreads them over ranks."""
    # The spacing keeps the per-rank offsets that Megatron-Core adds (below 2^16) from meeting.
    model_parallel_cuda_manual_seed((seed + iteration * 100_003) % 2**31)
