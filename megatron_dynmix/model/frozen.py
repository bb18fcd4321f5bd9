"""Weights of the model that stay as they are, though others beside them are trained.

Axes: F inner width of an expert on this rank, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads

from megatron_dynmix.moe.router import GateLoadRouter


def freeze_router(model: torch.nn.Module) -> None:
    """Keep every router's weights as they are; experts and all else go on learning."""
    for module in model.modules():
        if isinstance(module, GateLoadRouter):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def expert_gates(model: torch.nn.Module) -> Iterable[tuple[torch.nn.Parameter, slice]]:
    """Parameters that hold gate projections of routed experts, each with the rows that do.

    A rank's part of an expert's `linear_fc1.weight` is `[2F, H]`: the gate's rows, then as many of the up
    projection, whatever the tensor-parallel size.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name and ".linear_fc1.weight" in name:
            yield parameter, slice(0, parameter.shape[0] // 2)


def finalize_without_expert_gates(chunks: list[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
    """Megatron-Core's `finalize_model_grads`; then gate projections of experts have no gradient.

    Here, and not in a hook of the parameter: fused kernels add to `main_grad` past autograd. With no gradient
    and no weight decay AdamW leaves a weight as it is, and the gradient's norm is that of what is trained.
    """
    finalize_model_grads(chunks, *args, **kwargs)
    for chunk in chunks:
        for parameter, rows in expert_gates(chunk):
            parameter.main_grad[rows].zero_()
