"""Checkpoints: Megatron-Core's sharded tensors, and one small JSON file for everything else.

checkpoints/latest_checkpointed_iteration.txt    written last, atomically
checkpoints/iter_0000100/                        torch_dist shards, run_state.json, checksums.json
checkpoints/.iter_0000200.tmp/                   one that is not whole yet, or no longer
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dynmix.checkpoint.folder import (
    TRACKER,
    complete,
    folder_of,
    is_whole,
    newest_whole,
    saved_iterations,
    set_aside,
)
from megatron_dynmix.checkpoint.model_weights import (
    as_held,
    fill_weights,
    load_sharded,
    load_weights,
    model_state,
    named_chunks,
    set_state,
)
from megatron_dynmix.checkpoint.run_state import RunState, read_run_state
from megatron_dynmix.checkpoint.shards import ShardWriter
from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.files import sync, write_atomically
from megatron_dynmix.job.agreement import RankFailure, together
from megatron_dynmix.lease import Lease
from megatron_dynmix.model import optimizer as optimizers
from megatron_dynmix.model.gpt import whole_parameters


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    state: RunState
    run_state: str
    """Its text, before the run changes what it refers to."""
    writer: ShardWriter
    request: AsyncRequest
    process: TemporalAsyncCaller
    """What writes this rank's shards."""


@dataclass(kw_only=True, eq=False)
class Checkpointer:
    """Saves and loads one run."""

    directory: Path
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    keep_last: int | None = None
    lease: Lease | None = None
    """Rank 0's hold of the run directory: without it nothing is written, renamed or deleted there."""
    newest: int | None = None
    """Iteration of the newest whole checkpoint that this run has written or read."""
    good: int | None = None
    """`good` of the run state that was read."""
    _pending: _Pending | None = None

    def save(self, state: RunState, *, before: Callable[[], None] | None = None) -> None:
        """Take the state as it is now and begin to write it; `finish` makes a checkpoint of it.

        The newest whole checkpoint up to the state's `good` will not be deleted. What `before` does has to be
        on the disk first. Raise `RankFailure` on every rank if it cannot be written, and leave nothing.
        """
        assert self._pending is None, "one checkpoint after the other"
        staging, process = self._staging(state.progress.iteration), TemporalAsyncCaller()
        try:
            with together():
                if before is not None:
                    before()
                writer = ShardWriter()
                if torch.distributed.get_rank() == 0:
                    self._check_lease()
                    for leftover in self.directory.glob(".iter_*"):  # of a crash
                        shutil.rmtree(leftover, ignore_errors=True)
                    staging.mkdir(parents=True)
            with whole_parameters(self.chunks):
                request = writer.request(self._state(loading=False), staging)
                with together():
                    process.schedule_async_call(request)
        except RankFailure:
            self._abandon(process, staging)
            raise
        self._pending = _Pending(state, state.text(), writer, request, process)

    def finish(self, *, wait: bool) -> int | None:
        """Make a checkpoint of what is being written once all ranks have written; return its iteration.

        None, on all ranks, if they have not and are not to `wait`. Raises as `save` does.
        """
        pending = self._pending
        if pending is None:
            return None
        iteration = pending.state.progress.iteration
        try:
            if not pending.process.is_current_async_call_done(blocking=wait):
                return None
            for finalize in pending.request.finalize_fns:
                finalize()
            with together():
                if torch.distributed.get_rank() == 0:
                    self._complete(pending)
        except RankFailure:
            self._pending = None
            self._abandon(pending.process, self._staging(iteration))
            raise
        self._pending, self.newest = None, iteration
        return iteration

    def _complete(self, pending: _Pending) -> None:
        """Write all but the shards on rank 0, give the folder its name, set the tracker, delete old ones."""
        iteration = pending.state.progress.iteration
        staging, final = self._staging(iteration), folder_of(self.directory, iteration)
        self._check_lease()
        complete(staging, pending.run_state, pending.writer.sums)
        # That iteration may have a folder: a damaged one, or one of a run that was set back before it.
        replaced = [set_aside(final)]
        staging.rename(final)
        # Those of a future that did not come, as the run resumed from one before them, go before the tracker
        # comes to stand above them, or a later run might resume from one of them.
        for other in saved_iterations(self.directory):
            if self.newest is not None and other > self.newest and other != iteration:
                replaced.append(set_aside(folder_of(self.directory, other)))
        sync(self.directory)
        write_atomically(self.directory / TRACKER, str(iteration))
        for folder in replaced:
            shutil.rmtree(folder, ignore_errors=True)
        self._thin_out(pending.state)

    def _thin_out(self, state: RunState) -> None:
        """Delete old checkpoints; one that is not whole is not counted, and goes with those around it."""
        if self.keep_last is None:
            return
        iterations = [n for n in saved_iterations(self.directory) if n <= state.progress.iteration]
        kept = [n for n in iterations if is_whole(folder_of(self.directory, n))][: self.keep_last]
        protected = newest_whole(self.directory, state.good)
        for old in iterations:
            if old >= min(kept, default=0) or old == protected:
                continue
            with contextlib.suppress(OSError):  # what is whole is whole: a folder too many ends no run
                shutil.rmtree(set_aside(folder_of(self.directory, old)), ignore_errors=True)

    def _abandon(self, writing: TemporalAsyncCaller, staging: Path) -> None:
        """Remove what was begun; another rank may still be writing it."""
        process = writing.process
        writing.close(abort=True)
        if process is not None:
            process.join()
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)

    def _check_lease(self) -> None:
        if self.lease is not None:
            self.lease.check()

    def _staging(self, iteration: int) -> Path:
        return self.directory / f".iter_{iteration:07d}.tmp"

    def point_at(self, limit: int) -> Path | None:
        """Make the newest whole checkpoint up to an iteration the one to resume from; None without one.

        Raise `RankFailure` on every rank if the tracker cannot be written.
        """
        found: list[int | None] = [None]
        with together():
            if torch.distributed.get_rank() == 0:
                self._check_lease()
                found[0] = newest_whole(self.directory, limit)
                if found[0] is not None:
                    write_atomically(self.directory / TRACKER, str(found[0]))
        torch.distributed.broadcast_object_list(found, src=0)
        return None if found[0] is None else folder_of(self.directory, found[0])

    def load(self, source: Path) -> RunState:
        """Restore model, optimizer and schedule from a checkpoint that fits them; return its run state."""
        state = read_run_state(source)
        expected = self._state(loading=True)
        expected |= as_held({name: expected[name] for name, _ in named_chunks(self.chunks)}, source)
        loaded = load_sharded(expected, source)
        set_state(self.chunks, loaded)
        optimizers.load_optimizer_state(self.optimizer, loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        self.newest, self.good = state.progress.iteration, state.good
        return state

    def load_weights(self, source: Path) -> None:
        """Start from the weights of a checkpoint; optimizer, schedule and mix start new."""
        load_weights(self.chunks, source)
        self.optimizer.reload_model_params()

    def load_tensors(self, tensors: Tensors) -> None:
        """Start from tensors that are laid out as in a checkpoint."""
        fill_weights(self.chunks, tensors)
        self.optimizer.reload_model_params()

    def _state(self, *, loading: bool) -> dict[str, Any]:
        optimizers.materialize_state(self.optimizer)
        model = model_state(self.chunks)
        return {
            **model,
            "optimizer": optimizers.optimizer_state(self.optimizer, model, loading=loading),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }
