"""What a weight update's blend rebuild costs, at the start of a run and far into it.

Beside it, stock Megatron-Core: a `BlendedDataset` is built for the whole run, so to change its weights
means to build it again. The sources are stand-ins that know their size only; neither side reads rows or
writes files (stock would also save its index).
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_dynmix import platform
from megatron_dynmix.monitor.tables import table

platform.start()  # before anything that imports megatron.core

from megatron.core.datasets.blended_dataset import BlendedDataset  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402

from megatron_dynmix.data.dynamic_blend import DynamicBlendedDataset  # noqa: E402

TARGET_MS = 30.0
SEED = 1234


class StandIn:
    """A source that has rows in number only."""

    index_split = Split.train

    def __init__(self, dataset_id: int, num_rows: int) -> None:
        self.unique_identifiers = {"dataset_id": dataset_id}
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows


def stand_ins(arguments: argparse.Namespace, num_rows: int) -> list[Any]:
    """As many sources as asked for, of `num_rows` rows each."""
    return [StandIn(dataset_id, num_rows) for dataset_id in range(arguments.sources)]


def new_blend(arguments: argparse.Namespace) -> DynamicBlendedDataset:
    """The blend of a run that begins, with uniform weights."""
    return DynamicBlendedDataset(
        stand_ins(arguments, arguments.source_rows),
        np.full(arguments.sources, 1 / arguments.sources),
        seed=SEED,
        chunk_size=arguments.interval_rows,
    )


def milliseconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def time_updates(arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Milliseconds of the first update of new runs, and of updates after `consumed` rows, in pairs."""
    rng = np.random.default_rng(SEED)
    # from nearly uniform to far from it, as weights are in the course of a run
    draws = [rng.dirichlet(np.full(arguments.sources, a)) for a in np.geomspace(100, 0.3, arguments.pairs)]
    old = new_blend(arguments)
    while old.chunk.end_sample < arguments.consumed:
        old.append_stage(old.chunk.end_sample, rng.dirichlet(np.ones(arguments.sources)))
    times: dict[str, list[float]] = {"young": [], "old": []}
    for pair, weights_D in enumerate(draws):
        blends = {"young": new_blend(arguments), "old": old}
        for name in ("young", "old") if pair % 2 else ("old", "young"):
            blend = blends[name]
            end = blend.chunk.end_sample
            times[name].append(milliseconds(lambda: blend.append_stage(end, weights_D)))  # noqa: B023
    return times["young"], times["old"]


def time_stock(arguments: argparse.Namespace) -> list[float]:
    """Milliseconds of building the stock dataset for a run of `consumed` rows."""
    rng = np.random.default_rng(SEED)
    config = BlendedMegatronDatasetConfig(random_seed=SEED, sequence_length=1, mock=True)
    # stock refuses to draw a row twice: each source has as many as the run is long
    sources = stand_ins(arguments, arguments.consumed)
    times = []
    for _ in range(arguments.stock_builds):
        weights = rng.dirichlet(np.ones(arguments.sources)).tolist()
        times.append(milliseconds(lambda: BlendedDataset(sources, weights, arguments.consumed, config)))  # noqa: B023
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=int, default=64)
    parser.add_argument("--interval-rows", type=int, default=204_800, help="interval x global batch size")
    parser.add_argument("--source-rows", type=int, default=100_000, help="rows of each source")
    parser.add_argument(
        "--consumed", type=int, default=10_000_000, help="rows drawn before the later updates"
    )
    parser.add_argument("--pairs", type=int, default=100, help="updates timed at the start and later")
    parser.add_argument("--stock-builds", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)  # that no cache folder was given is meant
    young, old = time_updates(arguments)
    stock = time_stock(arguments)
    millions = f"{arguments.consumed / 1e6:g} million rows"

    def row(label: str, times: list[float]) -> list[object]:
        numbers = (np.median(times), min(times), max(times))
        return [label, *(f"{number:.1f}" for number in numbers), f"{np.median(times) / np.median(young):.2f}"]

    print(
        f"One weight update's blend rebuild: {arguments.sources} sources, {arguments.interval_rows:,} rows per "
        f"interval, milliseconds, {arguments.pairs} pairs of updates, {arguments.stock_builds} stock builds.\n"
        f"Target: median at most {TARGET_MS:g}, and the same at the start and later.\n"
    )
    rows = [
        row("append_stage, first of a run", young),
        row(f"append_stage, after {millions}", old),
        row(f"stock BlendedDataset of {millions}", stock),
    ]
    print(table(["rebuild", "median", "min", "max", "to the first"], rows))
    ratio = np.median(np.array(old) / np.array(young))
    print(f"\nMedian of the pairs' ratios, later to first: {ratio:.3f}")
    print(f"Stock to append_stage after {millions}: {np.median(stock) / np.median(old):.0f} times")


if __name__ == "__main__":
    main()
