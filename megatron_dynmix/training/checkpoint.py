"""Checkpoints: Megatron-Core's sharded tensors, and one small JSON file for everything else.

checkpoints/latest_checkpointed_iteration.txt    written last, atomically
checkpoints/iter_0000100/                        torch_dist shards, and run_state.json
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dynmix.errors import InputError
from megatron_dynmix.training.model import unwrap
from megatron_dynmix.training.optimizer import load_optimizer_state, materialise_state

TRACKER = "latest_checkpointed_iteration.txt"
RUN_STATE = "run_state.json"
FORMAT_VERSION = 1
# The default sharding of optimizer state cannot be saved from these optimizers, and another one could
# not be loaded into another layout.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True, kw_only=True)
class Checkpointer:
    """Saves and loads one run."""

    directory: Path
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def save(self, iteration: int, run_state: dict[str, Any]) -> Path:
        """Write `iter_*` and then point the tracker at it; a crash before that leaves the old checkpoint.

        Args:
            iteration: iterations done.
            run_state: plain JSON values, the same on every rank or given on rank 0 only.

        """
        target = self.directory / f"iter_{iteration:07d}"
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)  # what a crash left behind
            target.mkdir(parents=True)
        torch.distributed.barrier()
        materialise_state(self.optimizer)
        dist_checkpointing.save(self._state(loading=False), str(target))
        if torch.distributed.get_rank() == 0:
            state = {"format_version": FORMAT_VERSION, "iteration": iteration, **run_state}
            write_atomically(target / RUN_STATE, json.dumps(state))
            write_atomically(self.directory / TRACKER, str(iteration))
        torch.distributed.barrier()
        return target

    def point_at(self, iteration: int) -> Path:
        """Make an older checkpoint the one that is resumed from."""
        if torch.distributed.get_rank() == 0:
            write_atomically(self.directory / TRACKER, str(iteration))
        return self.directory / f"iter_{iteration:07d}"

    def load(self) -> dict[str, Any]:
        """Restore model, optimizer and schedule from the newest checkpoint; returns its run state."""
        source = latest_checkpoint(self.directory)
        state = read_run_state(source)
        materialise_state(self.optimizer)
        loaded = dist_checkpointing.load(self._state(loading=True), str(source))
        unwrap(self.model).load_state_dict(loaded["model"])
        load_optimizer_state(self.optimizer, loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        return state

    def load_weights(self, directory: Path) -> None:
        """Start from the weights of another run; optimizer, schedule and mix begin afresh."""
        source = latest_checkpoint(directory)
        model = unwrap(self.model)
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=METADATA)}, str(source))
        model.load_state_dict(loaded["model"])
        self.optimizer.reload_model_params()

    def _state(self, *, loading: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"model": unwrap(self.model).sharded_state_dict(metadata=METADATA)}
        state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=loading, metadata=METADATA)
        state["opt_param_scheduler"] = self.scheduler.state_dict()
        return state


def latest_checkpoint(directory: Path) -> Path:
    """The `iter_*` folder that the tracker names.

    Raises:
        InputError: no tracker, or one that names nothing.

    """
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise InputError(f"{directory} holds no checkpoint: there is no {TRACKER} in it")
    text = tracker.read_text().strip()
    source = directory / f"iter_{int(text):07d}" if text.isdigit() else directory / text
    if not source.is_dir():
        raise InputError(f"{tracker} names iteration {text}, but there is no folder {source}")
    return source


def read_run_state(source: Path) -> dict[str, Any]:
    """The run state of a checkpoint folder.

    Raises:
        InputError: no run state, or one of a newer version.

    """
    try:
        state = json.loads((source / RUN_STATE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{source / RUN_STATE} cannot be read ({error}); resume from another run") from None
    if not isinstance(state, dict) or "format_version" not in state:
        raise InputError(f"{source / RUN_STATE} is no run state; resume from another run")
    if state["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{source} was written by a newer version (format {state['format_version']}, this one reads "
            f"{FORMAT_VERSION}); update megatron-dynmix"
        )
    return dict(state)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
