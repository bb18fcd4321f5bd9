"""Megatron-Core's optimizer and learning-rate schedule for a run."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.megatron import optimizer_config


def build_optimizer(
    config: RunConfig, model: DistributedDataParallel
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Optimizer and schedule; the schedule counts samples, as Megatron-LM's does."""
    optimizer = get_megatron_optimizer(optimizer_config(config), [model])
    get_model_config(model).grad_scale_func = optimizer.scale_loss
    for part in sharded_parts(optimizer):
        part._set_main_param_and_optimizer_states = types.MethodType(_set_states_but_step, part)
    settings, batch = config.optimizer, config.training.global_batch_size
    assert batch is not None and config.training.train_iters is not None, "checked before start"
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters * batch,
        lr_decay_steps=(settings.lr_decay_iters or config.training.train_iters) * batch,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=config.training.train_iters * batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # the configuration decides, also when a run is resumed
    )
    return optimizer, scheduler


def sharded_parts(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    """The distributed optimizers that run on torch's own AdamW (no Transformer Engine, no apex).

    Megatron-Core's checkpoint code forgets that torch keeps a `step` tensor per parameter; see
    `materialise_state` and `_set_states_but_step`.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            yield part


def materialise_state(optimizer: MegatronOptimizer) -> None:
    """Give parameters that were never stepped their (zero) state, so that every checkpoint has all of it."""
    for part in sharded_parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


@torch.no_grad()
def _set_states_but_step(
    self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
) -> None:
    """Stands in for the method of that name: it looks for a saved `step` per parameter, and there is none."""
    group, order = self.model_param_group_index_map[model_param]
    main = self.optimizer.param_groups[group]["params"][order]
    state = self.optimizer.state[main]
    state["step"] = state["step"].clone()  # loading gave all parameters the same tensor
    main.copy_(tensors["param"])
    for name in state.keys() - {"step"}:
        state[name].copy_(tensors[name])


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """Load moments and steps; learning rates stay those of the configuration.

    Raises:
        KeyError, CheckpointingException: a state of another optimizer.

    """
    rates = [(group["max_lr"], group["min_lr"]) for group in optimizer.param_groups]
    _load_across_layouts(optimizer, loaded)
    for group, (max_lr, min_lr) in zip(optimizer.param_groups, rates, strict=True):
        group["max_lr"], group["min_lr"] = max_lr, min_lr


def _load_across_layouts(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """`optimizer.load_state_dict` that also takes a checkpoint of another expert-parallel layout.

    Megatron-Core has one optimizer without expert parallelism and two (dense, expert) with it, so the
    saved parameter groups are matched by what they are, not by where they stand.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        optimizer.load_state_dict(loaded)
        return
    saved = [loaded] if "optimizer" in loaded else [loaded[key] for key in sorted(loaded, key=str)]
    saved = [part for part in saved if isinstance(part, dict) and "optimizer" in part]
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    kind = ("wd_mult", "lr_mult", "is_decoupled_lr")
    for index, part in enumerate(parts):
        mine = loaded if len(parts) == 1 else loaded[index]
        mine["optimizer"] = {
            "param_groups": [
                {
                    **next(group for group in groups if all(group[key] == own[key] for key in kind)),
                    "is_expert_parallel": own["is_expert_parallel"],
                }
                for own in part.optimizer.param_groups
            ]
        }
        mine["param_state_sharding_type"] = saved[0]["param_state_sharding_type"]
    optimizer.load_state_dict(
        loaded if len(parts) == 1 else {index: loaded[index] for index in range(len(parts))}
    )
