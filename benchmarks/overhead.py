"""What the trainer adds to Megatron-Core: our iteration beside a bare loop, probing, and checkpoint stalls.

The bare loop is what Megatron-Core's own example does: its schedule, its optimizer, a loss over trained
tokens, and micro-batches that lie on the device already. Ours reads rows through worker processes, masks
segments, counts gate loads, keeps losses per source, looks at every gradient and seeds every iteration.
Both train the same model object, in the same process groups, on the same micro-batches, in pairs whose
order is swapped from pair to pair. Rank 0 reports; every rank waits for the others before each span.

Shape legend: P pairs; R repetitions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dynmix import platform
from megatron_dynmix.commands.quickstart import make_quickstart
from megatron_dynmix.records.text_table import table

HERE = platform.start()  # before anything that imports megatron.core

from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from megatron_dynmix.config.load import load_config  # noqa: E402
from megatron_dynmix.job.launch import launch_ranks  # noqa: E402
from megatron_dynmix.job.signals import StopRequest  # noqa: E402
from megatron_dynmix.training import run  # noqa: E402
from megatron_dynmix.training.batch import Batch, to_batch  # noqa: E402
from megatron_dynmix.training.setup import check_before_start, prepare_run  # noqa: E402
from megatron_dynmix.training.trainer import Trainer  # noqa: E402

TARGET = 1.03
INTERVAL = 100  # the paper's m, at which the share of probing is given
SETTLE = 4  # iterations in which an asynchronous save may end before the next one begins


def build_trainer(run_yaml: Path, run_dir: Path, flags: list[str]) -> Trainer:
    """Build the trainer of this rank, as `train` does."""
    config = load_config(run_yaml, flags)
    run.join_job(config)
    return run.build_trainer(prepare_run(check_before_start(config)), run_dir)


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call, from the moment at which every rank is there."""
    torch.distributed.barrier()
    HERE.synchronize()
    start = time.perf_counter()
    function()
    HERE.synchronize()
    return time.perf_counter() - start


def bare_step(trainer: Trainer, batches: list[Batch]) -> None:
    """Run an iteration of a loop that only trains."""
    for chunk in trainer.run.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=_bare_forward,
        data_iterator=iter(batches),
        model=trainer.run.chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=False,
    )
    trainer.optimizer.step()
    trainer.checkpointer.scheduler.step(increment=trainer.config.training.global_batch_size)


def _bare_forward(batches: Iterator[Batch], model: torch.nn.Module) -> Any:
    batch = next(batches)
    return batch.token_losses(model), partial(_bare_loss, batch.loss_mask)


def _bare_loss(loss_mask: torch.Tensor, token_loss: torch.Tensor) -> Any:
    total = (token_loss.float() * loss_mask).sum()
    return total, loss_mask.sum().to(torch.int), {"lm loss": total.detach()}


def measure_steps(
    trainer: Trainer, pairs: int, warmup: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds of our iteration and of the bare one, P times each."""
    read, held = trainer.loader.step, []

    def read_and_hold(*arguments: Any) -> Any:
        held[:] = read(*arguments)
        return held

    trainer.loader.step = read_and_hold  # type: ignore[method-assign]
    trainer.train_step(StopRequest())
    ours, bare = [], []
    for pair in range(pairs + warmup):
        # Rows of the iteration before: the loader shall go on from step to step, as it does in a run.
        batches = [to_batch(rows, HERE.device, join_rows=HERE.transformer_engine) for rows in held]
        spans = {
            "ours": (ours, partial(trainer.train_step, StopRequest())),
            "bare": (bare, partial(bare_step, trainer, batches)),
        }
        for name in ("ours", "bare") if pair % 2 else ("bare", "ours"):
            times, step = spans[name]
            times.append(seconds(step))
    return np.array(ours[warmup:]), np.array(bare[warmup:])


def measure_probe(trainer: Trainer, repetitions: int) -> NDArray[np.float64]:
    """Seconds of whole weight updates: probe, reduction, decision, new stage and its record."""
    assert trainer.mixed.reweighting.is_due(trainer.progress.iteration), "there would be nothing to time"
    return np.array([seconds(trainer.reweight) for _ in range(repetitions)])


def measure_saves(trainer: Trainer, repetitions: int) -> NDArray[np.float64]:
    """Seconds for which training stands still at a checkpoint; R of them, with training in between."""
    stalls = []
    for _ in range(repetitions):
        trainer.train_step(StopRequest())
        stalls.append(seconds(partial(trainer.save, last=False)))
        for _ in range(SETTLE):
            trainer.train_step(StopRequest())
            trainer.saving.settle(wait=False)
    trainer.saving.settle(wait=True)
    return np.array(stalls)


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank of the benchmark."""
    folder = arguments.folder
    flags = [
        *arguments.flags,
        "--expert-model-parallel-size",
        str(arguments.ranks),
        "--probe-tokens",
        "16384",
    ]

    def trainer(name: str, *more: str) -> Trainer:
        made = build_trainer(folder / "data/RUN.yaml", folder / name, [*flags, *more])
        made.say = made.saving.say = lambda text: None
        return made

    training = trainer("train", "--signal", "train")
    ours_P, bare_P = measure_steps(training, arguments.pairs, arguments.warmup)
    probe_R = measure_probe(trainer("probe", "--signal", "probe"), arguments.repetitions)
    sync_R = measure_saves(training, arguments.repetitions)
    async_R = measure_saves(trainer("async", "--signal", "train", "--async-save"), arguments.repetitions)
    if torch.distributed.get_rank() == 0:
        report(arguments, ours_P, bare_P, probe_R, sync_R, async_R)


def report(
    arguments: argparse.Namespace,
    ours_P: NDArray[np.float64],
    bare_P: NDArray[np.float64],
    probe_R: NDArray[np.float64],
    sync_R: NDArray[np.float64],
    async_R: NDArray[np.float64],
) -> None:
    """Print the three tables."""
    print(
        f"Tiny MoE, EP{arguments.ranks} on {HERE.device.type}, {arguments.pairs} pairs of iterations, "
        f"in milliseconds. Target: median of ours/bare at most {TARGET}.\n"
    )
    ratio = [f"{quantile:.4f}" for quantile in np.quantile(ours_P / bare_P, [0.5, 0.25, 0.75, 0, 1])]
    middle = [f"{1e3 * np.median(times_P):.1f}" for times_P in (ours_P, bare_P)]
    of_medians = f"{np.median(ours_P) / np.median(bare_P):.4f}"
    header = ["ours", "bare", "ours/bare", "q1", "q3", "min", "max", "of medians"]
    print(table(header, [[*middle, *ratio, of_medians]]), "\n")
    probe, iteration = float(np.median(probe_R)), float(np.median(ours_P))
    print(
        f"A weight update with 16,384 probe positions for each of 4 sources: {probe:.2f} s (median of "
        f"{len(probe_R)}), {100 * probe / (probe + INTERVAL * iteration):.2f} % of an interval of {INTERVAL} "
        "iterations.\n"
    )
    rows = [
        [name, *(f"{1e3 * value:.0f}" for value in (np.median(times_R), times_R.min(), times_R.max()))]
        for name, times_R in (("save", sync_R), ("async save", async_R))
    ]
    print(table(["training stands still for", "median ms", "min", "max"], rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ranks = platform.most_ranks(2)
    parser.add_argument("--ranks", type=int, default=ranks, help="two, or one where there is one GPU")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=4, help="pairs before the first that is timed")
    parser.add_argument("--repetitions", type=int, default=5, help="weight updates, and saves of each kind")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to ranks, which are started
    arguments, arguments.flags = parser.parse_known_args()  # the rest: flags of the run
    if arguments.folder is not None:
        rank_main(arguments)
        return 0
    with tempfile.TemporaryDirectory() as name:
        make_quickstart(Path(name) / "data")
        # a rank must know its place before torch is asked for devices
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--folder", name]
        return launch_ranks([*command, "--ranks", str(arguments.ranks)], arguments.ranks)


if __name__ == "__main__":
    sys.exit(main())
