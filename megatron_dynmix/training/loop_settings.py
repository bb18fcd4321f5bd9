"""The mix of a run in a loop that is not ours, from what a caller gives. Axes: D sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from megatron.core import parallel_state

from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.check.mixing import check_strategies
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.gate_loads import select_layers
from megatron_dynmix.mixing.weights import normalise_weights
from megatron_dynmix.training.mix import Horizon, Mix
from megatron_dynmix.training.mix_setup import refusing, resolve_files, row_caps

BySource = Mapping[str, float]


def mix_of(
    sizes: Mapping[str, int],
    mixing: MixingConfig | Mapping[str, Any],
    *,
    train_iters: int,
    batch_sizes: int | BatchSchedule,
    seed: int,
    weights: BySource | None,
    max_epochs: BySource | None,
    examples_per_row: BySource | None,
) -> Mix:
    """Make what decides the weights, as `MixedRun.of` says; `InputError` for what cannot be."""
    if not isinstance(mixing, MixingConfig):
        mixing = MixingConfig.from_flat(mixing)
    numbers = {"train_iters": train_iters, **{f"the size of source {name}": sizes[name] for name in sizes}}
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} is {number}; it must be 1 or more")
    names, size_D = list(sizes), np.array(list(sizes.values()), np.int64)
    if not names:
        raise InputError("no source is given; give the rows of at least one, as {name: rows}")
    if mixing.signal == "probe" and mixing.measures:
        raise InputError(
            "mixing.signal is probe, but only megatron-dynmix train runs held-out rows; give signal train"
        )
    if mixing.load_routers != "mlp":
        raise InputError(
            f"mixing.load_routers is {mixing.load_routers}, but only megatron-dynmix train builds attention "
            "with experts; leave it out"
        )
    if mixing.strategy == "uniform" and weights is not None and len(set(weights.values())) > 1:
        raise InputError("mixing.strategy is uniform, but the sources have different weights; use fixed")
    check_strategies(mixing, names, moe_layers=None)
    resolved = resolve_files(mixing, names)
    if max_epochs:
        _check_names("max_epochs", max_epochs, names)
        resolved["max_epochs"] = [max_epochs.get(name) for name in names]
    if mixing.unit == "examples":
        given = examples_per_row or {}
        missing = [name for name in names if name not in given]
        if missing:
            raise InputError(
                f"mixing.unit is examples, so examples_per_row is needed, of {', '.join(missing)} too"
            )
        _check_names("examples_per_row", given, names)
        resolved["examples_per_row"] = [given[name] for name in names]
    schedule = BatchSchedule.growing(batch_sizes) if isinstance(batch_sizes, int) else batch_sizes
    horizon = Horizon(
        schedule=schedule,
        train_iters=train_iters,
        interval=mixing.interval,
        seed=seed,
        size_D=size_D,
        cap_D=row_caps(resolved, size_D),
    )
    with refusing(mixing, "weights"):
        given_D = normalise_weights(dict.fromkeys(names, 1.0) if weights is None else weights, names)
    return Mix.beginning(mixing, resolved, names, horizon, given_D)


def _check_names(what: str, given: BySource, names: Sequence[str]) -> None:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise InputError(f"{what} names {', '.join(unknown)}, but the sources are {', '.join(names)}")


def check_step(schedule: BatchSchedule, micro_batch_size: int, log_interval: int) -> None:
    """Refuse batches that the ranks cannot share."""
    if min(micro_batch_size, log_interval) < 1:
        raise InputError(
            f"micro_batch_size is {micro_batch_size} and log_interval {log_interval}; both must be 1 or more"
        )
    each = micro_batch_size * parallel_state.get_data_parallel_world_size()
    for _, size in schedule.steps:
        if size < 1 or size % each:
            raise InputError(
                f"a batch of {size} samples is no multiple of {each}, micro_batch_size x data-parallel size; "
                "change one of them"
            )


def check_layers(mix: Mix, layers: list[int]) -> None:
    """Refuse strategies that read gates or layers that the model does not have."""
    names = mix.controller.sources
    check_strategies(mix.settings, names, moe_layers=layers)
    with refusing(mix.settings, sources=names):
        for strategy in (mix.controller.strategy, *mix.controller.shadows.values()):
            if strategy.needs_gate_load:
                select_layers(strategy.layers, len(layers))
