"""Megatron-Core's optimizer for a run, and what checkpoints hold of it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.utils import get_model_config

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.megatron import optimizer_config
from megatron_dynmix.model.boxes import boxes
from megatron_dynmix.platform.megatron_patches import measure_gradients_together, measure_huge_gradients

TORCH_ADAM = torch.optim.Adam | torch.optim.AdamW
"""What Megatron-Core steps with where neither Transformer Engine nor apex is installed."""


def build_optimizer(config: RunConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build the optimizer of all chunks of this rank."""
    measure_huge_gradients()
    cuda = next(chunks[0].parameters()).is_cuda  # sums are in another order: what a CPU computes stays
    if cuda:
        measure_gradients_together()
    optimizer = get_megatron_optimizer(optimizer_config(config), chunks)
    get_model_config(chunks[0]).grad_scale_func = optimizer.scale_loss
    if cuda:
        for part in _parts(optimizer):
            fuse(part.optimizer)
    return optimizer


def fuse(adam: torch.optim.Optimizer) -> None:
    """Have torch's own Adam, if it is what steps, do so in one kernel, and count its steps on the device."""
    if isinstance(adam, TORCH_ADAM):
        for group in (adam.defaults, *adam.param_groups):
            group.update(fused=True, foreach=False)


def materialize_state(optimizer: MegatronOptimizer) -> None:
    """Give parameters that were never stepped their (zero) state, so that every checkpoint has all of it."""
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, TORCH_ADAM):
            fused = part.optimizer.defaults["fused"]
            for parameter, state in part.optimizer.state.items():
                state.setdefault("step", torch.zeros((), device=parameter.device if fused else "cpu"))


def optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """Return what a checkpoint holds of the optimizer: steps done, per parameter master copy and moments.

    The tensors have the shape and the name of their parameter, whichever optimizer wrote them, so any
    layout can be loaded into any other, with or without the distributed optimizer; a rank of that one reads
    and writes the boxes of them that are its own. Parameter groups are not among them: the configuration
    decides those.
    """
    states = {
        index: _own_state(part, model_state, loading=loading)
        if isinstance(part, DistributedOptimizer)
        else _whole_state(part, model_state)
        for index, part in enumerate(_parts(optimizer))
    }
    # A rank that has nothing of a part has an empty mapping, which Megatron-Core takes for common state.
    held = {index: state for index, state in states.items() if state}
    return {"step": _step(optimizer), **({"state": held} if held else {})}


@torch.no_grad()
def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over what was loaded into `optimizer_state`; learning rates stay those of the configuration."""
    step = loaded["step"]
    for index, part in enumerate(_parts(optimizer)):
        state = loaded.get("state", {}).get(index, {})
        if isinstance(part, DistributedOptimizer):
            _load_own_state(part, state)
        else:
            _load_whole_state(part, state)
        for own in part.optimizer.state.values():
            if "step" in own:  # torch counts there, with a tensor for each parameter
                own["step"] = torch.full_like(own["step"], step)
        for group in part.optimizer.param_groups:
            group["step"] = step


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers of dense and of expert parameters, those with any parameters on this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def _step(optimizer: MegatronOptimizer) -> int:
    """Return the steps done; torch counts them per parameter, Transformer Engine and apex per group."""
    steps = {0}
    for part in _parts(optimizer):
        steps |= {int(state["step"]) for state in part.optimizer.state.values() if "step" in state}
        steps |= {int(group["step"]) for group in part.optimizer.param_groups if "step" in group}
    return max(steps)


def _own_ranges(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield each parameter of which this rank steps a range, with that range."""
    for ranges_by_type in part.gbuf_ranges:
        for buckets in ranges_by_type.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    own = ranges["param"]
                    if own.start < own.end:
                        yield parameter, own.start, own.end


def _own_state(part: DistributedOptimizer, model_state: dict[str, Any], *, loading: bool) -> dict[int, Any]:
    """Return, of the range of each parameter that this rank steps, what is to be loaded or saved.

    "flat" is the range itself: it is filled in loading, and in no checkpoint.
    """
    entry_of = _entries(model_state)
    states: dict[int, Any] = {}
    for index, (parameter, start, stop) in enumerate(_own_ranges(part)):
        tensors = part._get_main_param_and_optimizer_states(parameter)
        states[index] = {}
        for name in tensors.keys() - {"step"}:
            flat = tensors[name].detach().float()
            if loading:  # beside it: two entries of the checkpoint may not be loaded into one tensor
                flat = torch.zeros_like(flat)
            replica = part.distributed_optimizer_instance_id
            shards = _shards(entry_of[parameter], name, flat, start, stop, replica)
            states[index][name] = {"flat": LocalNonpersistentObject(flat), "shards": shards}
    return states


def _shards(
    entry: ShardedTensor | ShardedTensorFactory,
    name: str,
    flat: torch.Tensor,
    start: int,
    stop: int,
    replica: int,
) -> list[ShardedTensor]:
    """Return the boxes that a range of a parameter, given as `flat`, has of tensors of the checkpoint.

    `entry` is the parameter's; the last number of its replica is that of data-parallel ranks, of which only
    those of other optimizer instances have the same range.
    """
    nowhere = torch.empty_like(entry.data, device="meta", dtype=flat.dtype)
    replaced: dict[str, Any] = {"key": f"optimizer.state.{name}.{entry.key}", "data": nowhere}
    replaced["replica_id"] = (*entry.replica_id[:-1], replica)
    if isinstance(entry, ShardedTensor):
        replaced["dtype"] = flat.dtype
    whole = dataclasses.replace(entry, **replaced)
    shards = []
    for tensor in nested_values({"": whole.build() if isinstance(whole, ShardedTensorFactory) else whole}):
        ones, first = (1,) * tensor.prepend_axis_num, tensor.data.storage_offset() - start
        strides = tensor.data.stride()
        for offset, shape in boxes(tuple(tensor.data.shape), strides, -first, stop - start - first):
            place = flat.storage_offset() + first + sum(map(operator.mul, offset, strides))
            box = dataclasses.replace(
                tensor,
                data=flat.as_strided((*ones, *shape), (*ones, *strides), place),
                local_shape=(*ones, *shape),
                global_offset=tuple(map(operator.add, tensor.global_offset, (*[0] * len(ones), *offset))),
                axis_fragmentations=None,  # what Megatron-Core calls an irregular grid
                prepend_axis_num=0,
            )
            shards.append(box)
    return shards


def _load_own_state(part: DistributedOptimizer, loaded: dict[int, Any]) -> None:
    for index, (parameter, _, _) in enumerate(_own_ranges(part)):
        flats = {name: state["flat"] for name, state in loaded[index].items()}
        kept = part._get_main_param_and_optimizer_states(parameter)
        part._set_main_param_and_optimizer_states(parameter, {**kept, **flats})


def _mains(part: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield each parameter of the model with the one that is stepped: its master copy, or itself."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for half, master in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(half, master, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        for group in part.optimizer.param_groups:
            yield from zip(group["params"], group["params"], strict=True)


def _entries(model_state: dict[str, Any]) -> dict[torch.Tensor, Any]:
    """Return parameter -> how a checkpoint holds it."""
    entries, _ = extract_sharded_tensors_and_factories(model_state)
    return {entry.data: entry for entry in nested_values(entries)}


def _whole_state(part: MegatronOptimizer, model_state: dict[str, Any]) -> dict[int, Any]:
    """Return what `DistributedOptimizer.sharded_state_dict` would, of an optimizer that is not sharded."""
    entry_of, states = _entries(model_state), {}
    for index, (parameter, main) in enumerate(_mains(part)):
        # a copy, for a model in fp32: two entries of the checkpoint may not be loaded into one tensor
        tensors = {"param": main.detach().clone(), **part.optimizer.state[main]}
        states[index] = {
            name: make_sharded_optimizer_tensor(entry_of[parameter], tensor, f"optimizer.state.{name}")
            for name, tensor in tensors.items()
            if name != "step"
        }
    return states


def _load_whole_state(part: MegatronOptimizer, loaded: dict[int, Any]) -> None:
    for index, (_, main) in enumerate(_mains(part)):
        state = part.optimizer.state[main]
        for name, tensor in loaded[index].items():
            (main if name == "param" else state[name]).copy_(tensor)
