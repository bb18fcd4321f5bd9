"""One iteration of a run on a GPU that is not there: its memory, and where it waits for the device.

Rank r of N of the model is built and trained once on fake tensors (`platform.fake`): forward and backward
passes of all its micro-batches through Megatron-Core's schedule, the checks, the step of the optimizer. Then
a probe reads held-out rows, and a log interval ends. Axes: B rows, S positions of a row.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config import RunConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.platform.fake import process

SEGMENTS = 8
"""Examples in a row; how many there are changes nothing here."""
PROBED_ROWS = 2
"""Micro-batches of a source in the probe: more of them are more of the same."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one rank showed."""

    rank: int
    peak: int
    """Most bytes alive on the device in the iteration."""
    held: int
    """Bytes alive between iterations: weights, gradients, optimizer."""
    places: dict[str, int]
    """What was alive at the peak, by where it was made: `file:line (function)`."""
    waits: dict[str, dict[str, int]]
    """Waits for the device by line, in the `iteration`, a `probe`, the end of a `log` interval."""


def trace(run_yaml: Path, flags: list[str], *, rank: int, world_size: int, transformer_engine: bool) -> Trace:
    """Run one rank of a configuration that was checked, in a process of its own.

    Raises:
        InputError: this machine cannot, or the model takes a way that tells nothing without values.

    """
    if missing := process.what_is_missing(transformer_engine=transformer_engine):
        raise InputError(f"an iteration cannot be traced here: {missing}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "trace.json")
        settings = {"rank": rank, "world_size": world_size, "transformer_engine": transformer_engine}
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            __name__,
            json.dumps(settings),
            str(out),
            str(run_yaml),
        ]
        done = subprocess.run(
            [*command, *flags],
            env=process.environment(Path(folder), rank, world_size),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not out.exists():
            said = done.stderr.strip()[-2000:]
            raise InputError(f"the traced process ended with {done.returncode}: {said}")
        answer = json.loads(out.read_text(encoding="utf-8"))
    if "refused" in answer:
        raise InputError(f"this run cannot be traced without a GPU: {answer['refused']}")
    return Trace(**answer)


class _Rows:
    """Rows of a source that is not there, each of `SEGMENTS` examples."""

    def __init__(self, seq_length: int) -> None:
        segment_S = np.arange(seq_length) * SEGMENTS // seq_length
        zeros_S = np.zeros(seq_length, np.int64)
        self._row: dict[str, NDArray[Any]] = {
            **dict.fromkeys(("tokens", "labels", "position_ids"), zeros_S),
            "loss_mask": np.ones(seq_length, np.float32),
            "segment_ids": segment_S,
            "padding_mask": zeros_S > 0,
        }
        self.packed = SimpleNamespace(most_segments=2 * SEGMENTS)

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, row: int) -> dict[str, NDArray[Any]]:
        return self._row


def _traced(config: RunConfig, *, rank: int) -> Trace:
    """Run the iteration; the stand-ins are in place."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from megatron_dynmix import platform
    from megatron_dynmix.model.optimizer import build_optimizer, materialize_state
    from megatron_dynmix.platform.fake import observe
    from megatron_dynmix.training.run import build_runner, join_job
    from megatron_dynmix.training.step import BeforePass, take_aux_losses
    from megatron_dynmix.training.trainer import seed_iteration

    here = platform.start()
    waits: dict[str, dict[str, int]] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        observe.waits.clear()
        yield
        waits[name] = dict(observe.waits.most_common())

    join_job(config)
    rows = [_Rows(config.data.seq_length)] * len(config.data.sources)
    count = get_num_microbatches()
    device, memory = observe.device_here(), observe.Memory()
    with device, memory:
        seed_iteration(config.training.seed, -1)
        run = build_runner(config, len(rows), here)
        optimizer = build_optimizer(config, run.chunks)
        materialize_state(optimizer)  # as from the second iteration on
        held = memory.now
    probe = _probe(config, run, rows)
    micro_batches = [_micro_batch(config, run, rows) for _ in range(count)]
    with device, memory:
        memory.begin()
        with phase("iteration"):
            seed_iteration(config.training.seed, 0)
            for chunk in run.chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            before = BeforePass(run)
            with run.counter.recording():
                run.train(micro_batches, stop=lambda: False)
            optimizer.step()
            del before
        peak, places = memory.peak()
        with phase("probe"):
            if probe is not None:
                probe.measure({}, 0)
        with phase("log"):
            take_aux_losses(run.chunks[0].config, count)
    return Trace(rank=rank, peak=peak, held=held, places=places, waits=waits)


def _micro_batch(config: RunConfig, run: Any, rows: Any) -> Any:
    """Return a micro-batch as the loader brings one."""
    from megatron_dynmix.data.loader import collate, pinned

    draw = {"dataset_id": np.int16(0), "row": np.int64(0), "half": np.int8(0), **rows[0][0]}
    return pinned(collate([draw] * config.training.micro_batch_size, run.most_segments(rows)))


def _probe(config: RunConfig, run: Any, rows: Any) -> Any:
    """Return the probe of the run, of a few rows; None if it has none."""
    from megatron.core import parallel_state

    from megatron_dynmix.training.probe import Probe

    if config.mixing.signal != "probe":
        return None
    ranks, micro = parallel_state.get_data_parallel_world_size(), config.training.micro_batch_size
    return Probe(
        rows,
        run,
        probe_tokens=PROBED_ROWS * micro * ranks * config.data.seq_length,
        seq_length=config.data.seq_length,
        micro_batch_size=micro,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=ranks,
        pin_memory=True,
        most_segments=run.most_segments(rows),
    )


def _main(settings: str, out: str, run_yaml: str, *flags: str) -> None:
    """Write what one rank shows, or why it cannot."""
    from megatron_dynmix.platform.fake import device

    given = json.loads(settings)
    answer: dict[str, Any]
    try:
        device.install(**given)
        from megatron_dynmix.config.load import load_config

        answer = dataclasses.asdict(_traced(load_config(Path(run_yaml), list(flags)), rank=given["rank"]))
    except InputError as error:
        answer = {"refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        at = traceback.extract_tb(error.__traceback__)[-1]
        answer = {"refused": f"{type(error).__name__} at {at.filename}:{at.lineno}: {error}"}
    Path(out).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
