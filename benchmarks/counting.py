"""What counting gate loads costs: iterations of the tiny MoE with it and without it, in one process.

The iteration is the trainer's own (reading, forward, backward, optimizer). Each pair trains twice on the
same micro-batches, once counting and once not, in an order that is swapped from pair to pair. Beside the
ratio of their times stands the time spent in the counter itself: a difference of two iterations drowns
in the noise of a busy machine, a sum of short spans does not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dynmix import platform
from megatron_dynmix.monitor.tables import table
from megatron_dynmix.quickstart import make_quickstart

HERE = platform.start()  # before anything that imports megatron.core

from megatron_dynmix.config.load import load_config  # noqa: E402
from megatron_dynmix.training import run  # noqa: E402
from megatron_dynmix.training.trainer import Trainer  # noqa: E402

TARGET = 1.01
MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE = 8, 32


class Stopwatch:
    """Sums the seconds spent in the functions that it was put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        @wraps(function)
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            HERE.synchronize()
            self.seconds += time.perf_counter() - start
            return result

        return timed


@dataclass(frozen=True)
class Timings:
    """Seconds of each pair of iterations, P pairs."""

    on_P: np.ndarray
    off_P: np.ndarray
    counter_P: np.ndarray
    """Part of `on_P` that was spent in the counter."""

    def row(self, seq_length: int) -> list[object]:
        """One line of the table; times in milliseconds."""
        ratio_P = self.on_P / self.off_P
        return [
            f"{seq_length:,}",
            *(f"{1e3 * np.median(times_P):.1f}" for times_P in (self.on_P, self.off_P)),
            *(f"{quantile:.4f}" for quantile in np.quantile(ratio_P, [0.5, 0.25, 0.75, 0, 1])),
            f"{1e3 * np.median(self.counter_P):.2f}",
            f"{1 + np.median(self.counter_P / (self.on_P - self.counter_P)):.4f}",
        ]


def build_trainer(folder: Path, run_yaml: Path, seq_length: int, pairs: int) -> Trainer:
    """A one-rank run on the quickstart's sources, as `train` builds it."""
    steps = 2 * pairs  # also the interval: one chunk of the blend holds all of them
    flags = f"--seq-length {seq_length} --expert-model-parallel-size 1 --signal train --num-workers 0"
    flags += f" --micro-batch-size {MICRO_BATCH_SIZE} --global-batch-size {GLOBAL_BATCH_SIZE}"
    config = load_config(run_yaml, f"{flags} --train-iters {steps} --interval {steps}".split())
    tokenizer = run.check_before_start(config, world_size=1)
    data = run.read_data(config, tokenizer)
    run._join_job(config)
    return run._build_trainer(config, folder / f"run-{seq_length}", data, HERE, resuming=False)


def measure(trainer: Trainer, pairs: int, warmup: int) -> Timings:
    """Time `pairs` pairs of iterations, after `warmup` more that are not reported."""
    counter, stopwatch = trainer.run.counter, Stopwatch()
    for name in ("set_sources", "add"):
        setattr(counter, name, stopwatch.around(getattr(counter, name)))
    signals = {"on": "train", "off": "probe"}
    mixing = trainer.reweighting.mixing
    seconds_P: dict[str, list[float]] = {"on": [], "off": [], "counter": []}
    for pair in range(pairs + warmup):
        for name in ("on", "off") if pair % 2 else ("off", "on"):
            trainer.reweighting.mixing = replace(mixing, signal=signals[name])
            assert trainer.reweighting.counts_training == (name == "on")
            # every other batch only: else the loader would go on in one of the two and start anew in the other
            trainer.progress.iteration = 2 * pair
            trainer.progress.consumed_samples = 2 * pair * GLOBAL_BATCH_SIZE
            stopwatch.seconds = 0.0
            HERE.synchronize()
            start = time.perf_counter()
            trainer._train_step()
            HERE.synchronize()
            seconds_P[name].append(time.perf_counter() - start)
            if name == "on":
                seconds_P["counter"].append(stopwatch.seconds)
    return Timings(*(np.array(seconds_P[name][warmup:]) for name in ("on", "off", "counter")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--pairs", type=int, default=60, help="pairs of iterations for each length")
    parser.add_argument("--warmup", type=int, default=4, help="pairs before the first that is timed")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        run_yaml = make_quickstart(Path(name) / "data")
        for seq_length in arguments.seq_lengths:
            trainer = build_trainer(Path(name), run_yaml, seq_length, arguments.pairs + arguments.warmup)
            rows.append(measure(trainer, arguments.pairs, arguments.warmup).row(seq_length))
            trainer.writer.close()
    print(
        f"Gate-load counting: tiny MoE, one {HERE.device.type} rank, {GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE} "
        f"micro-batches of {MICRO_BATCH_SIZE} rows, {arguments.pairs} pairs of iterations each, milliseconds.\n"
        f"Target: median of on/off at most {TARGET}. 'by counter' is the same ratio from the time spent in the "
        "counter alone.\n"
    )
    header = ["seq_length", "on", "off", "on/off", "q1", "q3", "min", "max", "in counter", "by counter"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
