"""What a weight update's blend rebuild costs, at the start of a run and far into it.

Beside it, stock Megatron-Core: a `BlendedDataset` is built for the whole run, so to change its weights
means to build it again. The sources are stand-ins that know their size only; neither side reads rows or
writes files (stock would also save its index).

Shape legend: D sources, P pairs of updates; 2 clocks (wall, CPU).
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix import platform
from megatron_dynmix.records.text_table import table

platform.start()  # before anything that imports megatron.core

from megatron.core.datasets.blended_dataset import BlendedDataset  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402

from megatron_dynmix.data.blend_plan import BlendPlan  # noqa: E402

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


def new_blend(arguments: argparse.Namespace) -> BlendPlan:
    """Make the blend of a run that begins, with uniform weights."""
    return BlendPlan(
        [arguments.source_rows] * arguments.sources,
        np.full(arguments.sources, 1 / arguments.sources),
        names=[f"source {number}" for number in range(arguments.sources)],
        seed=SEED,
        chunk_size=arguments.interval_rows,
    )


def milliseconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall time of one call, and CPU time of the process: other programs disturb the latter less."""
    start, start_cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - start_cpu)


def time_rebuild(blend: BlendPlan, weights_D: NDArray[np.float64]) -> tuple[float, float]:
    """Milliseconds of a weight update's rebuild, when the current chunk is used up."""
    end = blend.chunk.end_sample
    return milliseconds(lambda: blend.append_stage(end, weights_D))


def time_updates(arguments: argparse.Namespace) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return times `[P, 2]` of the first update of new runs, and of updates after `consumed` rows."""
    rng = np.random.default_rng(SEED)
    # from nearly uniform to far from it, as weights are in the course of a run
    draws = [rng.dirichlet(np.full(arguments.sources, a)) for a in np.geomspace(100, 0.3, arguments.pairs)]
    old = new_blend(arguments)
    while old.chunk.end_sample < arguments.consumed:
        old.append_stage(old.chunk.end_sample, rng.dirichlet(np.ones(arguments.sources)))
    times: dict[str, list[tuple[float, float]]] = {"young": [], "old": []}
    for pair, weights_D in enumerate(draws):
        blends = {"young": new_blend(arguments), "old": old}
        for name in ("young", "old") if pair % 2 else ("old", "young"):
            times[name].append(time_rebuild(blends[name], weights_D))
    return np.array(times["young"]), np.array(times["old"])


def time_stock(arguments: argparse.Namespace) -> NDArray[np.float64]:
    """Return times `[builds, 2]` of making the stock dataset for a run of `consumed` rows."""
    rng = np.random.default_rng(SEED)
    config = BlendedMegatronDatasetConfig(
        random_seed=SEED, sequence_length=1, blend=(["stand-in"], None), split="1"
    )
    # stock refuses to draw a row twice: each source has as many as the run is long
    stand_ins: list[Any] = [StandIn(number, arguments.consumed) for number in range(arguments.sources)]
    build = partial(BlendedDataset, stand_ins, config=config)
    draws = rng.dirichlet(np.ones(arguments.sources), size=arguments.stock_builds).tolist()
    times = [milliseconds(partial(build, weights=weights, size=arguments.consumed)) for weights in draws]
    return np.array(times)


def report(arguments: argparse.Namespace, young: NDArray, old: NDArray, stock: NDArray) -> str:
    """Return the table, and the ratios on both clocks."""
    millions = f"{arguments.consumed / 1e6:g} million rows"

    def row(label: str, times_P2: NDArray) -> list[object]:
        wall, cpu = np.median(times_P2, axis=0)
        spread = times_P2[:, 0].min(), times_P2[:, 0].max(), times_P2[:, 1].min(), times_P2[:, 1].max()
        numbers = (wall, spread[0], spread[1], cpu, spread[2], spread[3])
        return [label, *(f"{number:.1f}" for number in numbers)]

    rows = [
        row("append_stage, first of a run", young),
        row(f"append_stage, after {millions}", old),
        row(f"stock BlendedDataset, {millions}", stock),
    ]
    same = np.median(old / young, axis=0)
    times = np.median(stock, axis=0) / np.median(old, axis=0)
    return "\n".join(
        [
            f"Blend rebuild of one weight update: {arguments.sources} sources, "
            f"{arguments.interval_rows:,} rows per interval,\nin milliseconds; {arguments.pairs} pairs of "
            f"updates, {arguments.stock_builds} stock builds.\n"
            f"Target: median at most {TARGET_MS:g}, and the same at the start and later.",
            "",
            table(["rebuild", "wall", "min", "max", "CPU", "min", "max"], rows),
            "",
            f"later / first, median of the pairs: {same[0]:.3f} wall, {same[1]:.3f} CPU",
            f"stock / append_stage after {millions}: {times[0]:.0f} wall, {times[1]:.0f} CPU",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=int, default=64)
    parser.add_argument("--interval-rows", type=int, default=204_800, help="interval x global batch size")
    parser.add_argument("--source-rows", type=int, default=100_000, help="rows of each source")
    parser.add_argument("--consumed", type=int, default=10_000_000, help="rows drawn before later updates")
    parser.add_argument("--pairs", type=int, default=60, help="updates timed at the start and later")
    parser.add_argument("--stock-builds", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)  # that no cache folder was given is meant
    print(report(arguments, *time_updates(arguments), time_stock(arguments)))


if __name__ == "__main__":
    main()
