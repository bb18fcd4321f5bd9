"""Layouts that can run, where the one asked for cannot: searched among all sizes that divide."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.host import Host
from megatron_dynmix.errors import InputError
from megatron_dynmix.plan.layout import Layout
from megatron_dynmix.plan.memory import memory_by_stage

TENSOR_SIZES = (1, 2, 4, 8)
"""Tensor-parallel ranks talk in every layer: more than a node's are never worth it."""
CONTEXT_SIZES = (1, 2, 4, 8)
LONG_ROWS = 8192
"""Positions from which context parallelism is proposed to runs that do not ask for it."""
NODE = 8
"""Ranks of a node, where all-to-all is cheap."""
SHOWN = 3
ECONOMIES: dict[str, dict[str, Any]] = {
    "": {},
    "--bias-activation-fusion": {"bias_activation_fusion": True},
    "--recompute-granularity selective --recompute-modules [moe]": {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
    },
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "recompute_modules": None,
    },
}
"""Ways to keep fewer activations, as flags and as settings of the model.

The cheapest comes first: a fused activation costs nothing, full recomputation a forward pass.
"""
Check = Callable[[RunConfig, int], None]
"""Refuses a configuration on a number of ranks: an InputError."""


@dataclass(frozen=True)
class Alternative:
    """A layout that passes every check."""

    layout: Layout
    needed: int
    """Bytes of a GPU."""
    bubble: float
    economy: str
    """Flags that it needs beside those of the layout."""

    def describe(self) -> str:
        """Return flags, memory and bubble in one line."""
        layout = self.layout
        sizes = {
            **{"tensor-model": layout.tp, "pipeline-model": layout.pp, "context": layout.cp},
            **{"expert-model": layout.ep, "expert-tensor": layout.etp},
        }
        flags = [f"--{name}-parallel-size {size}" for name, size in sizes.items()]
        flags += ["--sequence-parallel"] if layout.tp > 1 else []
        flags += [self.economy] if self.economy else []
        needs = f"needs {self.needed / 2**30:.1f} GiB a GPU, stages wait {self.bubble:.0%}"
        return f"{' '.join(flags)}  ({needs})"


def propose(
    config: RunConfig, world_size: int, host: Host, check: Check, gpu_bytes: int | None
) -> list[Alternative]:
    """Return the layout asked for with what makes it fit, then the best few others.

    Among the others: smallest TP, no CP, all-to-all inside a node, short bubbles. Batch, model and precision
    stay as they are. Without `gpu_bytes` any memory will do.
    """

    def alternative(candidate: RunConfig, economy: str) -> Alternative | None:
        candidate = _with_model(candidate, ECONOMIES[economy])
        try:
            check(candidate, world_size)
            layout = Layout.of(candidate, world_size)
            largest = max(memory_by_stage(candidate, layout, host), key=lambda stage: stage.total)
        except InputError:  # it cannot run, or cannot be sized: what was asked for says which
            return None
        if gpu_bytes is not None and largest.needed > gpu_bytes:
            return None
        return Alternative(layout, largest.needed, layout.bubble_share(candidate), economy)

    tried = (alternative(config, economy) for economy in ECONOMIES)
    found = [*itertools.islice(filter(None, tried), 1)]
    others = _sizes(config, world_size)
    for economy in ECONOMIES:
        for sizes in others:
            other = alternative(_with_layout(config, sizes), economy)
            if other and other not in found:
                found.append(other)
            if len(found) == SHOWN:
                return found
        if found:
            break
    return found


class _Sizes(NamedTuple):
    tp: int
    pp: int
    cp: int
    ep: int


def _sizes(config: RunConfig, world_size: int) -> list[_Sizes]:
    """Return all that divide the ranks, the layers and the experts, the best first."""
    given, training = config.model.megatron, config.training
    is_long = config.parallel.size("context_parallel_size") > 1 or config.data.seq_length >= LONG_ROWS
    found = itertools.product(
        TENSOR_SIZES,
        _divisors(int(given["num_layers"])),
        CONTEXT_SIZES if is_long else (1,),
        _divisors(int(given.get("num_moe_experts") or 1)),
    )

    def preference(sizes: _Sizes) -> tuple[Any, ...]:
        dp = world_size // (sizes.tp * sizes.pp * sizes.cp)
        count = max((training.global_batch_size or 1) // (training.micro_batch_size * dp), 1)
        bubble = (sizes.pp - 1) / (count + sizes.pp - 1)
        return (sizes.tp, sizes.cp, sizes.ep > NODE, round(bubble, 2), sizes.ep)

    fitting = [
        sizes
        for sizes in itertools.starmap(_Sizes, found)
        if world_size % (sizes.tp * sizes.pp * sizes.cp) == 0 and world_size % (sizes.ep * sizes.pp) == 0
    ]
    return sorted(fitting, key=preference)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _with_model(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    model = {**config.model.megatron, **settings}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, megatron=model))


def _with_layout(config: RunConfig, sizes: _Sizes) -> RunConfig:
    """Return the run in another layout, without what only goes with the pipeline that it had."""
    parallel = {
        **config.parallel.megatron,
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "context_parallel_size": sizes.cp,
        "expert_model_parallel_size": sizes.ep,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": sizes.tp > 1,
    }
    model = dict(config.model.megatron)
    if sizes.pp != config.parallel.size("pipeline_model_parallel_size"):
        for name in ("virtual_pipeline_model_parallel_size", "overlap_p2p_comm", "batch_p2p_comm"):
            parallel.pop(name, None)
        model = {name: value for name, value in model.items() if not name.startswith("num_layers_in_")}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, megatron=model),
        parallel=dataclasses.replace(config.parallel, megatron=parallel),
    )


def nearest_world_sizes(config: RunConfig, world_size: int, check: Check) -> list[int]:
    """Return the next numbers of ranks below and above, if any, that the layout asked for can run on."""

    def passes(ranks: int) -> bool:
        try:
            check(config, ranks)
        except InputError:
            return False
        return True

    layout = Layout.of(config, world_size)
    step = math.lcm(layout.tp * layout.pp * layout.cp, layout.etp * layout.ep * layout.pp)
    good = [*filter(passes, range(step, 2 * max(world_size, step) + 1, step))]
    below, above = [n for n in good if n < world_size], [n for n in good if n > world_size]
    return below[-1:] + above[:1]
