"""Megatron-Core's optimizer for a run, and what checkpoints hold of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.utils import get_model_config

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.megatron import optimizer_config
from megatron_dynmix.platform.megatron_patches import (
    load_states_without_step,
    measure_gradients_together,
    measure_huge_gradients,
)

SHARDING_TYPE = "fully_reshardable"
"""The default cannot be saved from these optimizers, and another one not be loaded into another layout."""
TORCH_ADAM = torch.optim.Adam | torch.optim.AdamW
"""What Megatron-Core steps with where neither Transformer Engine nor apex is installed."""


def build_optimizer(config: RunConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build the optimizer, which can load the states that checkpoints hold."""
    measure_huge_gradients()
    cuda = next(chunks[0].parameters()).is_cuda  # sums are in another order: what a CPU computes stays
    if cuda:
        measure_gradients_together()
    optimizer = get_megatron_optimizer(optimizer_config(config), chunks)
    get_model_config(chunks[0]).grad_scale_func = optimizer.scale_loss
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            load_states_without_step(part)
        if cuda:
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


def sharding_metadata() -> dict[str, Any]:
    """Say how to shard, in a new mapping each time: Megatron-Core keeps a layout's process groups in it."""
    return {
        "distrib_optim_sharding_type": SHARDING_TYPE,
        # Only the data-parallel rank that writes gathers the state, instead of all of them.
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """Return what a checkpoint holds of the optimizer: steps done, per parameter master copy and moments.

    The tensors have the shape and the name of their parameter, whichever optimizer wrote them, so any
    layout can be loaded into any other, with or without the distributed optimizer. Parameter groups are not
    among them: the configuration decides those.
    """
    states = {}
    for index, part in enumerate(_parts(optimizer)):
        if isinstance(part, DistributedOptimizer):
            state = part.sharded_state_dict(model_state, loading, metadata=sharding_metadata())
            states[index] = state["param_state"]
        else:
            states[index] = _whole_state(part, model_state)
    # A rank that writes nothing of a part has an empty mapping, which Megatron-Core takes for common state.
    held = {index: state for index, state in states.items() if state}
    return {"step": _step(optimizer), **({"state": held} if held else {})}


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over what was loaded into `optimizer_state`; learning rates stay those of the configuration."""
    step = loaded["step"]
    for index, part in enumerate(_parts(optimizer)):
        state = loaded["state"][index]
        if isinstance(part, DistributedOptimizer):
            groups = part.state_dict()["optimizer"]["param_groups"]
            part.load_state_dict(
                {
                    "optimizer": {"param_groups": [{**group, "step": step} for group in groups]},
                    "param_state": state,
                    "param_state_sharding_type": SHARDING_TYPE,
                }
            )
        else:
            _load_whole_state(part, state, step)


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


def _whole_state(part: MegatronOptimizer, model_state: dict[str, Any]) -> dict[int, Any]:
    """Return what `DistributedOptimizer.sharded_state_dict` would, of an optimizer that is not sharded."""
    entries, _ = extract_sharded_tensors_and_factories(model_state)
    entry_of = {entry.data: entry for entry in nested_values(entries)}
    states = {}
    for index, (parameter, main) in enumerate(_mains(part)):
        # a copy, for a model in fp32: two entries of the checkpoint may not be loaded into one tensor
        tensors = {"param": main.detach().clone(), **part.optimizer.state[main]}
        states[index] = {
            name: make_sharded_optimizer_tensor(entry_of[parameter], tensor, f"optimizer.state.{name}")
            for name, tensor in tensors.items()
            if name != "step"
        }
    return states


@torch.no_grad()
def _load_whole_state(part: MegatronOptimizer, loaded: dict[int, Any], step: int) -> None:
    for index, (_, main) in enumerate(_mains(part)):
        state = part.optimizer.state[main]
        for name, tensor in loaded[index].items():
            (main if name == "param" else state[name]).copy_(tensor)
        if "step" in state:
            state["step"].fill_(step)
    for group in part.optimizer.param_groups:
        if "step" in group:
            group["step"] = step
