"""What counting gate loads costs: passes of the tiny MoE with it and without it, in one process.

A pass is the run's own, forward and backward; reading and the optimizer, which count nothing, are left out.
Each pair runs the same micro-batches twice, once counting and once not, in an order that is swapped from pair
to pair. Both clocks
are read: wall time, which is what a user waits, and CPU time of the process, which other programs on the
machine disturb less. Beside the ratio stands the time spent in the counter itself: a difference of two
passes drowns in noise, a sum of short spans does not.

Shape legend: P pairs; 2 clocks (wall, CPU).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix import platform
from megatron_dynmix.commands.quickstart import make_quickstart
from megatron_dynmix.records.text_table import table

HERE = platform.start()  # before anything that imports megatron.core

from megatron_dynmix.config.load import load_config  # noqa: E402
from megatron_dynmix.training import run  # noqa: E402
from megatron_dynmix.training.setup import check_before_start, prepare_run  # noqa: E402
from megatron_dynmix.training.trainer import Trainer  # noqa: E402

TARGET = 1.01
MICRO_BATCH_POSITIONS = 1024  # as in the quickstart; counting weighs most when micro-batches are small
MICRO_BATCHES = 4
CLOCKS = ("wall", "CPU")


class Stopwatch:
    """Sums the milliseconds spent in the functions that it was put around, on both clocks."""

    def __init__(self) -> None:
        self.milliseconds_2 = np.zeros(2)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function, timed."""

        @wraps(function)
        def timed(*arguments: Any) -> Any:
            start_2 = clocks()
            result = function(*arguments)
            self.milliseconds_2 += clocks() - start_2
            return result

        return timed


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each pair of passes."""

    on_P2: NDArray[np.float64]
    off_P2: NDArray[np.float64]
    counter_P2: NDArray[np.float64]
    """Part of `on_P2` that was spent in the counter."""

    def row(self, clock: int) -> list[object]:
        """Return what one clock says, for the table."""
        on_P, off_P, counter_P = (times[:, clock] for times in (self.on_P2, self.off_P2, self.counter_P2))
        return [
            *(f"{np.median(times_P):.1f}" for times_P in (on_P, off_P)),
            *(f"{quantile:.4f}" for quantile in np.quantile(on_P / off_P, [0.5, 0.25, 0.75, 0, 1])),
            f"{np.median(counter_P):.2f}",
            f"{1 + np.median(counter_P / (on_P - counter_P)):.4f}",
        ]


def clocks() -> NDArray[np.float64]:
    """Return milliseconds on the wall and of this process, once the device has done its work."""
    HERE.synchronize()
    return 1e3 * np.array([time.perf_counter(), time.process_time()])


def build_trainer(folder: Path, run_yaml: Path, seq_length: int) -> Trainer:
    """Build a one-rank run on the quickstart's sources, as `train` does."""
    rows = max(MICRO_BATCH_POSITIONS // seq_length, 1)
    flags = f"--seq-length {seq_length} --micro-batch-size {rows} --global-batch-size {MICRO_BATCHES * rows}"
    flags += " --signal train --num-workers 0 --expert-model-parallel-size 1"
    config = load_config(run_yaml, flags.split())
    run.join_job(config)
    return run.build_trainer(prepare_run(check_before_start(config)), folder / f"run-{seq_length}")


def measure(trainer: Trainer, pairs: int, warmup: int) -> Timings:
    """Time `pairs` pairs of passes, after `warmup` more that are not reported."""
    counter, stopwatch = trainer.run.counter, Stopwatch()
    for name in ("set_sources", "add"):
        setattr(counter, name, stopwatch.around(getattr(counter, name)))
    micro_batches = trainer.loader.step(trainer.progress.consumed_samples, MICRO_BATCHES)
    times: dict[str, list[NDArray[np.float64]]] = {"on": [], "off": [], "counter": []}
    for pair in range(pairs + warmup):
        for name in ("on", "off") if pair % 2 else ("off", "on"):
            for chunk in trainer.run.chunks:
                chunk.zero_grad_buffer()
            stopwatch.milliseconds_2 = np.zeros(2)
            start_2 = clocks()
            with counter.recording() if name == "on" else nullcontext():
                trainer.run(micro_batches, forward_only=False)
            times[name].append(clocks() - start_2)
            if name == "on":
                times["counter"].append(stopwatch.milliseconds_2)
    return Timings(*(np.array(times[name][warmup:]) for name in ("on", "off", "counter")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--pairs", type=int, default=60, help="pairs of passes for each length")
    parser.add_argument("--warmup", type=int, default=4, help="pairs before the first that is timed")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        run_yaml = make_quickstart(Path(name) / "data")
        for seq_length in arguments.seq_lengths:
            trainer = build_trainer(Path(name), run_yaml, seq_length)
            timings = measure(trainer, arguments.pairs, arguments.warmup)
            rows += [[f"{seq_length:,} {clock}", *timings.row(c)] for c, clock in enumerate(CLOCKS)]
            trainer.writer.close()
    print(
        f"Gate-load counting: tiny MoE, one {HERE.device.type} rank, {MICRO_BATCHES} micro-batches of "
        f"{MICRO_BATCH_POSITIONS:,} positions,\n{arguments.pairs} pairs of passes, in milliseconds. "
        f"Target: median of on/off at most {TARGET}.\n"
        "'by counter' is the ratio that follows from the time spent in the counter.\n"
    )
    header = ["seq_length", "on", "off", "on/off", "q1", "q3", "min", "max", "in counter", "by counter"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
