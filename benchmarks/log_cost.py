"""What logging costs: the share of a tiny run's training time that is spent on writing and showing numbers.

The quickstart's run on one rank, with its own intervals. Timed are all calls of the writer (JSONL,
TensorBoard scalars, heat maps, text, flushes) and of the line on the terminal; what is left of the wall time
of the loop is the iteration's own. A share of short spans is stable where the difference of two runs is not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_dynmix import platform
from megatron_dynmix.commands.quickstart import make_quickstart
from megatron_dynmix.records.text_table import table

HERE = platform.start()  # before anything that imports megatron.core

from megatron_dynmix.config.load import load_config  # noqa: E402
from megatron_dynmix.job.signals import StopRequest  # noqa: E402
from megatron_dynmix.training import run  # noqa: E402
from megatron_dynmix.training.setup import check_before_start, prepare_run  # noqa: E402
from megatron_dynmix.training.trainer import Trainer  # noqa: E402

TARGET = 0.01
WRITER_CALLS = ("training", "mixing", "ledger", "flush")
LINE_CALLS = ("step", "say")

Spent = dict[str, float]


def timed(function: Callable[..., Any], spent: Spent, name: str) -> Callable[..., Any]:
    """Wrap a function; its seconds are added to `spent[name]`."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[name] += time.perf_counter() - start

    return call


def build_trainer(folder: Path, iterations: int) -> Trainer:
    """Build the quickstart's run, as `train` builds it on one rank."""
    run_yaml = make_quickstart(folder / "data")
    config = load_config(
        run_yaml,
        [
            *("--train-iters", str(iterations), "--lr-warmup-iters", "0"),
            *("--expert-model-parallel-size", "1", "--num-workers", "0"),
        ],
    )
    run.join_job(config)
    return run.build_trainer(prepare_run(check_before_start(config)), folder / "run")


def measure(trainer: Trainer) -> tuple[Spent, float]:
    """Seconds in each kind of call, and of the whole loop but its checkpoint and its probes."""
    spent: Spent = defaultdict(float)
    for name in WRITER_CALLS:
        setattr(trainer.writer, name, timed(getattr(trainer.writer, name), spent, name))
    for name in LINE_CALLS:
        setattr(trainer.live, name, timed(getattr(trainer.live, name), spent, name))
    trainer.say = trainer.live.say
    others: Spent = defaultdict(float)
    trainer.save = timed(trainer.save, others, "save")  # type: ignore[method-assign]
    decide = trainer.mixed.reweighting
    decide.update = timed(decide.update, others, "update")  # type: ignore[method-assign]
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(StopRequest(), SimpleNamespace(iteration=0))
    return spent, time.perf_counter() - start - sum(others.values())


def main() -> None:
    """Measure and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=100)
    iterations = parser.parse_args().iterations
    with tempfile.TemporaryDirectory() as name:
        spent, wall = measure(build_trainer(Path(name), iterations))
    own = wall - sum(spent.values())
    rows = [
        [name, f"{1e3 * seconds / iterations:.3f}", f"{seconds / own:.4f}"] for name, seconds in spent.items()
    ]
    total = sum(spent.values())
    rows.append(["all", f"{1e3 * total / iterations:.3f}", f"{total / own:.4f}"])
    print(
        f"Logging: the quickstart's tiny MoE on one {HERE.device.type} rank, {iterations} iterations of "
        f"{1e3 * own / iterations:.0f} ms.\nTarget: at most {TARGET} of the iteration.\n"
    )
    print(table(["call", "ms per iteration", "of the iteration"], rows))


if __name__ == "__main__":
    main()
