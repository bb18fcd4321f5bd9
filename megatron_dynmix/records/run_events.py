"""When a run was begun, gone on with and ended: lines of `events.jsonl`, which nothing is ever taken off.

The other records are those of the run that would have been had nothing happened; this one says what did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from megatron_dynmix import __version__
from megatron_dynmix.errors import StoppedOnRequest, TrainingStopped
from megatron_dynmix.records.jsonl import JsonlWriter
from megatron_dynmix.training.progress import Progress

EVENTS = "events.jsonl"


@contextlib.contextmanager
def recorded(run_dir: Path, progress: Progress, *, resumed: bool, notes: Sequence[str]) -> Iterator[None]:
    """Around the training of a job, on every rank; rank 0 writes.

    A job that is killed writes no end: what follows in the file is the next start.

    Args:
        run_dir: the run's directory.
        progress: how far the run is, now and at the end.
        resumed: whether it goes on from a checkpoint.
        notes: changed settings, checkpoints that were not good.

    Raises:
        TrainingStopped: the file cannot be written.

    """
    if torch.distributed.get_rank() != 0:
        yield
        return
    writer = JsonlWriter(run_dir / EVENTS)

    def write(event: str, notes: Sequence[str]) -> None:
        writer.write(
            {
                "iteration": progress.iteration,
                "event": event,
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "version": __version__,
                "ranks": torch.distributed.get_world_size(),
                "notes": list(notes),
            }
        )

    write("resume" if resumed else "start", notes)
    event, said = "failed", ""
    try:
        yield
        event = "finished"
    except (StoppedOnRequest, KeyboardInterrupt) as error:
        event, said = "stopped", str(error)
        raise
    except BaseException as error:
        said = str(error)
        raise
    finally:
        with contextlib.suppress(TrainingStopped):  # what ended the run is what is told
            write(event, [said] if said else [])
            writer.close()
