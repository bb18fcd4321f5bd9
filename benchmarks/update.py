"""What deciding on new weights costs: loads, distances, noise, guardrails and two shadows.

Beside it, the floor: counts of that size must at least be divided by their sums once. The counts are random,
drawn from loads with experts in unequal use, so that no distance is a special case.

Shape legend: H halves, D sources, L layers, E experts, U updates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.controller import MixingController
from megatron_dynmix.mixing.gate_loads import gate_load
from megatron_dynmix.mixing.guardrails import Guardrails
from megatron_dynmix.mixing.strategies.gate_load import GateLoad, Inverse
from megatron_dynmix.mixing.strategies.uniqueness import Uniqueness
from megatron_dynmix.mixing.strategy import Signal, Strategy
from megatron_dynmix.records.text_table import table

TARGET_MS = 50.0
SEED = 1234


def signals(arguments: argparse.Namespace, tokens: int) -> list[Signal]:
    """Make what is measured for each of the updates, on so many tokens of a source."""
    rng = np.random.default_rng(SEED)
    load_DLE = rng.dirichlet(np.full(arguments.experts, 2.0), size=(arguments.sources, arguments.layers))
    size_D = rng.integers(10_000, 100_000, size=arguments.sources)
    measured = []
    for update in range(arguments.updates):
        half_counts_HDLE = rng.poisson(tokens / 2 * load_DLE, size=(2, *load_DLE.shape))
        measured.append(
            Signal(
                counts_DLE=half_counts_HDLE.sum(axis=0),
                half_counts_HDLE=half_counts_HDLE,
                iteration=100 * (update + 1),
                interval_rows=12_800,
                size_D=size_D,
                drawn_D=np.minimum(200 * update, size_D),
            )
        )
    return measured


def controller(arguments: argparse.Namespace, strategy: Strategy, **beside: Any) -> MixingController:
    """Build a rule, with what is to be had beside it."""
    sources = [f"source-{index}" for index in range(arguments.sources)]
    return MixingController(sources, even(arguments), strategy, **beside)


def even(arguments: argparse.Namespace) -> NDArray[np.float64]:
    """Return equal weights."""
    return np.full(arguments.sources, 1 / arguments.sources)


def everything(arguments: argparse.Namespace) -> MixingController:
    """Build the published rule on all layers, with all that can be had beside it; shadows as published."""
    return controller(
        arguments,
        GateLoad(layers="all", metric="scaled-l2", debias=True, min_gap=2.0),
        guardrails=Guardrails(
            floor=0.1 / arguments.sources,
            max_kl_step=0.01,
            min_entropy=0.5,
            prior_D=even(arguments),
            prior_pull=0.01,
            max_epochs_D=np.full(arguments.sources, 4.0),
        ),
        shadows={"published": GateLoad(), "inverse": Inverse()},
    )


def milliseconds(call: Callable[[Signal], object], measured: list[Signal]) -> NDArray[np.float64]:
    """Wall time and CPU time of the process of each call, `[U, 2]`."""
    times = []
    for signal in measured:
        start, start_cpu = time.perf_counter(), time.process_time()
        call(signal)
        times.append((time.perf_counter() - start, time.process_time() - start_cpu))
    return 1e3 * np.array(times)


def report(arguments: argparse.Namespace) -> str:
    """Return the table, and the share of the floor."""
    measured, few = signals(arguments, arguments.tokens), signals(arguments, arguments.few_tokens)
    rule, default = GateLoad(layers="all"), Uniqueness()
    times = {
        "everything": milliseconds(everything(arguments).update, measured),
        "gate-load alone": milliseconds(controller(arguments, rule).update, measured),
        "uniqueness alone": milliseconds(controller(arguments, default).update, measured),
        "the same of few tokens, remembering": milliseconds(controller(arguments, default).update, few),
        "floor: normalising the counts": milliseconds(
            lambda signal: gate_load(signal.counts_DLE, "all"), measured
        ),
    }

    def row(label: str, times_U2: NDArray[np.float64]) -> list[object]:
        wall, cpu = np.median(times_U2, axis=0)
        numbers = (wall, times_U2[:, 0].min(), times_U2[:, 0].max(), cpu)
        return [label, *(f"{number:.1f}" for number in numbers)]

    whole, *_, floor = (np.median(times_U2[:, 0]) for times_U2 in times.values())
    return "\n".join(
        [
            f"One weight update: {arguments.sources} sources x {arguments.layers} layers x "
            f"{arguments.experts} experts, in milliseconds; {arguments.updates} updates.",
            "Everything: gate load of all layers, debiased, gaps of 2 errors, five guardrails, two shadows",
            "that read the last layer.",
            f"Target: median at most {TARGET_MS:g}.",
            "",
            table(["update", "wall", "min", "max", "CPU"], [row(*item) for item in times.items()]),
            "",
            f"share of the floor: {floor / whole:.1%}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="choices counted per source and layer")
    parser.add_argument("--few-tokens", type=int, default=10_000, help="where earlier updates must help")
    parser.add_argument("--updates", type=int, default=20)
    print(report(parser.parse_args()))


if __name__ == "__main__":
    main()
