"""What the ranks of the checkpoint tests run. Axes: D sources, L MoE layers, E experts."""

import contextlib
import errno
import functools
import hashlib
import io
import os
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_dynmix.checkpoint import checkpointer, folder, shards
from megatron_dynmix.config.load import load_config
from megatron_dynmix.errors import InputError, TrainingStopped
from megatron_dynmix.records.jsonl import read_records
from megatron_dynmix.records.schema import plain
from megatron_dynmix.records.writer import MetricsWriter
from tests.distributed import layouts, programs


def runs_in_turn(run_yaml, runs):
    """Whole runs, one after another in one job, each in a layout of its own: [(flags, run_dir, resume)]."""
    answers = []
    for flags, run_dir, resume in runs:
        if parallel_state.model_parallel_is_initialized():
            layouts.start_anew()
            parallel_state.destroy_model_parallel()
        answers.append(run(run_yaml, flags, run_dir, resume))
    return answers


def run(run_yaml, flags, run_dir, resume="no"):
    """One run; returns what it has written, and its last state."""
    trainer = programs.train_from(load_config(run_yaml, flags), run_dir, resume=resume)
    blend = trainer.mixed.plan.state.to_json()
    torch.distributed.barrier()
    metrics, updates = read_records(run_dir / "metrics.jsonl"), programs.updates_of(run_dir)
    return {
        "losses": [record["lm_loss"] for record in metrics],
        "tokens": [record["tokens"] for record in metrics],
        "rows": [update.rows for update in updates],
        "loads": [plain(update.load) for update in updates],
        "weights": [update.new_weights for update in updates],
        "blend": blend,
        "parameters": [
            hashlib.sha256(parameter.detach().float().numpy()).hexdigest()
            for chunk in trainer.run.chunks
            for parameter in chunk.parameters()
        ],
    }


def save_initial_weights(run_yaml, flags, run_dir):
    """Weights that every layout can start from."""
    programs.save_initial_weights(run_yaml, flags, run_dir)


def full_disk(what, *, rank, iteration):
    """A patch: on that rank, when that file of that iteration's checkpoint is written, the disk is full."""

    def full(original, path_of):
        @functools.wraps(original)  # Megatron-Core looks at the signature
        def write(*args, **kwargs):
            if torch.distributed.get_rank() == rank and f"iter_{iteration:07d}" in str(path_of(*args)):
                if what == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)  # as when memory is out
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return write

    owner, name, path_of = {
        "common.pt": (shards.torch, "save", lambda state, file: file if isinstance(file, Path) else ""),
        "shard": (filesystem_async, "_write_item", lambda transforms, stream, *rest: stream.name),
        "killed": (filesystem_async, "_write_item", lambda transforms, stream, *rest: stream.name),
        ".metadata": (
            filesystem_async.FileSystemWriterAsync,
            "finish",
            lambda self, *rest: self.checkpoint_dir,
        ),
        "fork": (
            checkpointer.TemporalAsyncCaller,
            "schedule_async_call",
            lambda self, request: request.async_fn_args[1][0][0],
        ),
        "records": (MetricsWriter, "flush", lambda self: f"iter_{last_record(self)['iteration']:07d}"),
        "run_state.json": (folder, "write_atomically", lambda path, text: path),
    }[what]
    return mock.patch.object(owner, name, full(getattr(owner, name), path_of))


def last_record(writer):
    """What was written last into `metrics.jsonl`."""
    return read_records(writer._metrics._path)[-1]


def outcome(run_yaml, flags, run_dir, resume="no"):
    """What a run said on this rank, and how it ended."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            run(run_yaml, flags, run_dir, resume)
            end = None
        except (TrainingStopped, InputError) as error:
            end = f"{type(error).__name__}: {error}"
    return said.getvalue().splitlines(), end


def failures(run_yaml, cases):
    """Runs with a full disk at some moment: [(flags, run_dir, what, rank, iteration)]."""
    answers = []
    for flags, run_dir, what, rank, iteration in cases:
        with full_disk(what, rank=rank, iteration=iteration):
            answers.append(outcome(run_yaml, flags, run_dir))
    return answers


def written_late(run_yaml, flags, run_dir):
    """A run whose shards are not written before iteration 3 is on record."""
    write = shards._write_and_hash

    def late(*args):
        while len((run_dir / "metrics.jsonl").read_text().splitlines()) < 3:
            time.sleep(0.02)
        write(*args)

    with mock.patch.object(shards, "_write_and_hash", late):
        return outcome(run_yaml, flags, run_dir)


def outcomes(run_yaml, runs):
    """Runs, one after another: [(flags, run_dir, resume)]."""
    return [outcome(run_yaml, *run) for run in runs]


def on_a_small_disk(run_yaml, flags, run_dir, sizes):
    """A run on a disk of its own, resumed after each change of that disk's size; None is read-only."""
    answers = [outcome(run_yaml, flags, run_dir)]
    for size in sizes:
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            option = "ro" if size is None else f"size={size}"
            command = ["mount", "-o", f"remount,{option}", str(run_dir / "checkpoints")]
            subprocess.run(command, check=True)
        torch.distributed.barrier()
        answers.append(outcome(run_yaml, flags, run_dir, "must"))
    return answers
