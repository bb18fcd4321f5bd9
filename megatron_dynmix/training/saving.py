"""The checkpoints of a running loop: which is being written, which is whole, which is known to be good."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from megatron_dynmix.checkpoint.checkpointer import Checkpointer
from megatron_dynmix.checkpoint.folder import TRACKER, folder_of
from megatron_dynmix.checkpoint.run_state import RunState
from megatron_dynmix.config import RunConfig
from megatron_dynmix.errors import TrainingStopped
from megatron_dynmix.files import inodes_are_used_up
from megatron_dynmix.job.agreement import RankFailure, first_failure, on_rank_0
from megatron_dynmix.job.resources import DISK, exhausted
from megatron_dynmix.records.logline import saved_line, saving_line


class Saving:
    """Saves as the configuration says, and knows what a run may fall back on."""

    def __init__(self, config: RunConfig, checkpointer: Checkpointer, say: Callable[[str], None]) -> None:
        self.config, self.checkpointer, self.say = config, checkpointer, say
        self.directory = checkpointer.directory
        self.newest = checkpointer.newest
        """Iteration of the newest checkpoint, whole or being written."""
        self.good = checkpointer.good
        """Iteration of the newest checkpoint from which an iteration was trained."""
        if self.good is None and self.newest is not None:
            self.good = self.newest - 1  # not known: it is older than the one that is resumed from

    def trained(self) -> None:
        """Take note that an iteration was trained from the newest checkpoint."""
        self.good = self.newest

    def save(self, state: RunState, *, last: bool, before: Callable[[], None] | None = None) -> None:
        """Write a checkpoint; beside the training that follows it, if the configuration asks for that.

        What is good is put into the state here; for `before` see `Checkpointer.save`. If the run ends with
        it, the `last` one, it is whole on return.
        """
        self.settle(wait=True)
        self.stop_if_lost()
        self.say(saving_line(state.progress.iteration, self.directory, datetime.now()))
        try:
            self.checkpointer.save(replace(state, good=self.good), before=before)
        except RankFailure as failure:
            self._failed(state.progress.iteration, failure, last=last)
            return
        self.newest = state.progress.iteration
        if last or not self.config.checkpoint.async_save:
            self.settle(wait=True, last=last)

    def stop_if_lost(self) -> None:
        """End the run, on all ranks, if its directory is another's by now; every rank must come here."""
        lease = self.checkpointer.lease
        if text := first_failure(None if lease is None else lease.lost()):
            raise TrainingStopped(on_rank_0(text)) from None

    def settle(self, *, wait: bool, last: bool = False) -> None:
        """See whether what is being written is whole, or `wait` until it is; all ranks see the same."""
        try:
            iteration = self.checkpointer.finish(wait=wait)
        except RankFailure as failure:
            assert self.newest is not None, "something was being written"
            self._failed(self.newest, failure, last=last)
            return
        if iteration is not None:
            size = self.config.parallel.size
            tp_size, pp_size = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
            self.say(saved_line(iteration, self.directory, datetime.now(), tp_size=tp_size, pp_size=pp_size))
            self._export(iteration)

    def _export(self, iteration: int) -> None:
        """Write a checkpoint that is whole for Hugging Face too, if the configuration asks for that."""
        save_hf, total = self.config.checkpoint.save_hf, self.config.training.train_iters
        if save_hf is None or (save_hf == "end" and iteration != total):
            return
        from megatron_dynmix.convert.export_hf import export

        checkpoint = folder_of(self.directory, iteration)
        destination = folder_of(self.directory.parent / "hugging_face", iteration)
        try:
            export(checkpoint, destination, self.checkpointer.lease)
        except RankFailure as failure:
            self.stop_if_lost()
            self._stop_or_say(
                f"{destination} could not be written: {failure} ({_free(self.directory)}). {checkpoint} is "
                f"whole; `megatron-dynmix convert megatron-to-hf {checkpoint} DIR` makes the folder from it",
                stop=iteration == total,
            )
            return
        self.say(f"  successfully saved {destination}")

    def fall_back(self, iteration: int) -> Path | None:
        """Make the newest good checkpoint before `iteration` the one to resume from; None if there is none.

        The state of now, and so a checkpoint of it, may be broken.
        """
        if self.good is None:
            return None
        limit = min(self.good, iteration - 1)
        try:
            return self.checkpointer.point_at(limit)
        except RankFailure as failure:
            self.stop_if_lost()
            text = f"{TRACKER} cannot be written ({failure}): write {limit} into it before --resume"
            raise TrainingStopped(on_rank_0(text)) from None

    def _failed(self, iteration: int, failure: RankFailure, *, last: bool) -> None:
        self.stop_if_lost()
        whole = self.newest = self.checkpointer.newest
        if self.good == iteration:
            self.good = whole
        left, remedy = "No checkpoint was written before", ""
        if whole is not None:
            left = f"The last good one is {folder_of(self.directory, whole)}"
            remedy = ", and --resume goes on from it"
        used_up = None if re.search(DISK, str(failure)) else exhausted(failure)
        self._stop_or_say(
            f"the checkpoint of iteration {iteration} could not be written: {failure} "
            f"({_free(self.directory)}). {left}",
            stop=last,
            remedy=f"{remedy}. {used_up or 'Make room, or give another --run-dir'}",
        )

    def _stop_or_say(self, text: str, *, stop: bool, remedy: str = "") -> None:
        """End the run with what went wrong, or only say it, as the configuration wants."""
        if stop or self.config.checkpoint.on_save_error == "stop":
            raise TrainingStopped(on_rank_0(text + remedy)) from None
        self.say(f"{text}; the run goes on, as on_save_error is continue")


def _free(directory: Path) -> str:
    """Say what room is left; a disk that is gone does not tell."""
    try:
        free = shutil.disk_usage(directory if directory.is_dir() else directory.parent).free / 2**30
    except OSError as error:
        return f"the room in {directory} cannot be told: {error.strerror}"
    if inodes_are_used_up(directory):
        return f"no inode is free in {directory}, see df -i: remove files, however small"
    return f"{free:.1f} GiB are free in {directory}"
