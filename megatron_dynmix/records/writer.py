"""The one door for a run's records: its files, its dashboards, and the story of its starts and ends."""

from __future__ import annotations

import contextlib
import platform as machine
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_dynmix import __version__
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import to_dict, to_yaml
from megatron_dynmix.errors import InputError, StoppedOnRequest, TrainingStopped
from megatron_dynmix.files import write_atomically
from megatron_dynmix.lease import Lease
from megatron_dynmix.records.dashboards import TensorBoardWriter, WeightsAndBiasesWriter
from megatron_dynmix.records.jsonl import JsonlWriter, naming, read_lines
from megatron_dynmix.records.schema import (
    Event,
    EventKind,
    MixingUpdate,
    SamplesLine,
    StageLine,
    TrainingRecord,
)
from megatron_dynmix.records.signals import SIGNALS, SignalWriter

Board = TensorBoardWriter | WeightsAndBiasesWriter


class MetricsWriter:
    """Writes `metrics.jsonl`, `mixing.jsonl`, `signals.bin`, `ledger.jsonl` and `tensorboard/` in `run_dir`.

    Call it on one rank only. `resume_iteration` is the iteration of the checkpoint that the run resumes from
    (-1: it starts over), and what was recorded after it is cut off; an update made at the very iteration of
    a checkpoint stays, so it has to be part of that checkpoint. None is a new run: `InputError` where the
    folder holds records of another. `TrainingStopped` where a file cannot be written. Nothing is written once
    the `lease` of the folder is lost: the run is about to stop. With `wandb_project`, Weights & Biases gets
    the same numbers under the same names.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_iteration: int | None,
        lease: Lease | None = None,
        wandb_project: str | None = None,
        wandb_exp_name: str | None = None,
    ):
        self._lease = lease
        metrics, mixing, ledger = (run_dir / f"{name}.jsonl" for name in ("metrics", "mixing", "ledger"))
        for path in (metrics, mixing, ledger, run_dir / SIGNALS):
            if resume_iteration is None and path.exists() and path.stat().st_size:
                raise InputError(
                    f"{path} holds the records of another run; a new run cannot add its own. Resume that "
                    "run, or choose another run directory."
                )
        self._metrics = JsonlWriter(metrics, keep_until=resume_iteration)
        self._mixing = JsonlWriter(mixing, keep_until=resume_iteration)
        self._signals = SignalWriter(run_dir / SIGNALS, read_lines(mixing, MixingUpdate))
        self._ledger = JsonlWriter(ledger, keep_until=resume_iteration)
        self._files = (self._metrics, self._signals, self._mixing, self._ledger)
        purge_step = None if resume_iteration is None else resume_iteration + 1
        self._events = run_dir / "tensorboard"
        tensorboard = TensorBoardWriter(self._events, purge_step=purge_step)
        # On resuming, TensorBoard hides kept points of these curves, whose steps are samples and not
        # iterations: those from `purge_step` on. The ones before are still there.
        for record in read_lines(metrics, TrainingRecord):
            if record.consumed_samples >= (purge_step or 0):
                tensorboard.samples(record)
        self._boards: list[Board] = [tensorboard]
        if wandb_project is not None:
            resumes = resume_iteration is not None
            self._boards.append(
                WeightsAndBiasesWriter(run_dir, project=wandb_project, name=wandb_exp_name, resumes=resumes)
            )

    def training(self, record: TrainingRecord) -> None:
        """Write the record of one log interval."""
        if self._is_lost():
            return
        self._metrics.write(record)
        self._show(lambda board: board.training(record))

    def mixing(self, update: MixingUpdate) -> None:
        """Write the record of one weight update."""
        if self._is_lost():
            return
        if update.arrays:
            update = replace(update, block=self._signals.append(update.arrays))
        self._mixing.write(update)
        self._show(lambda board: board.mixing(update))

    def ledger(self, line: StageLine | SamplesLine) -> None:
        """Write one line of the ledger."""
        if not self._is_lost():
            self._ledger.write(line)

    def text(self, tag: str, markdown: str) -> None:
        """Show a text on the dashboards, such as the resolved configuration."""
        self._show(lambda board: board.text(tag, markdown))

    def settings(self, settings: Mapping[str, bool | int | float | str]) -> None:
        """Tell the dashboards the settings of the run, to compare it with others."""
        self._show(lambda board: board.settings(settings))

    def flush(self) -> None:
        """Hand everything to the disk."""
        for file in self._files:
            file.flush()
        self._show(lambda board: board.flush())

    def close(self) -> None:
        """Hand everything to the disk and close the files."""
        for file in self._files:
            file.close()
        self._show(lambda board: board.close())

    def _is_lost(self) -> bool:
        return self._lease is not None and self._lease.lost() is not None

    def _show(self, write: Callable[[Board], None]) -> None:
        with naming(self._events):
            for board in self._boards:
                write(board)


EVENTS = "events.jsonl"
"""Starts and ends of the processes that train. Nothing is ever cut off it: the other records are those of the
run that would have been had nothing happened, this one says what did."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy", "transformers")


def open_writer(
    config: RunConfig,
    run_dir: Path,
    source_tables: Sequence[str],
    *,
    resume_iteration: int | None,
    lease: Lease | None = None,
) -> MetricsWriter:
    """Open the writer of a run, on one rank; write `config.yaml` and tell the dashboards what runs."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", to_yaml(config))
    writer = MetricsWriter(
        run_dir,
        resume_iteration=resume_iteration,
        lease=lease,
        wandb_project=config.logging.wandb_project,
        wandb_exp_name=config.logging.wandb_exp_name,
    )
    writer.text("config", f"```yaml\n{to_yaml(config)}```")
    writer.text("versions", "\n".join(f"- {name} {version}" for name, version in versions().items()))
    writer.text("sources", "\n\n".join(f"```\n{table}\n```" for table in source_tables))
    writer.settings(flat_settings(to_dict(config)))
    return writer


def versions() -> dict[str, str]:
    """Return what the run is made of, as far as it is installed."""
    found = {"megatron-dynmix": __version__, "python": machine.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return settings under `section.name`, or `data.sources.NAME.name`; lists as text."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            flat[f"{prefix}{name}"] = ", ".join(map(str, value))
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


@contextlib.contextmanager
def recorded(
    run_dir: Path,
    iteration: Callable[[], int],
    *,
    resumed: bool,
    notes: Sequence[str],
    lease: Lease | None = None,
) -> Iterator[None]:
    """Around the training of a job, on every rank: put its start and its end on record; rank 0 writes.

    A job that is killed or has lost its `lease` writes no end: what follows in the file is the next start.
    `iteration` tells how many are done; `notes` are changed settings, and checkpoints that were not good.
    """
    if torch.distributed.get_rank() != 0:
        yield
        return
    writer = JsonlWriter(run_dir / EVENTS)

    def write(event: EventKind, notes: Sequence[str]) -> None:
        writer.write(
            Event(
                iteration=iteration(),
                event=event,
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                version=__version__,
                ranks=torch.distributed.get_world_size(),
                notes=list(notes),
            )
        )

    write("resume" if resumed else "start", notes)
    event: EventKind = "finished"
    said = ""
    try:
        yield
    except BaseException as error:
        event = "stopped" if isinstance(error, StoppedOnRequest | KeyboardInterrupt) else "failed"
        said = str(error)
        raise
    finally:
        with contextlib.suppress(TrainingStopped):  # what ended the run is what is told
            if lease is None or lease.lost() is None:
                write(event, [said] if said else [])
            writer.close()
