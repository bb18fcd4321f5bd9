"""The router's auxiliary losses, as Megatron-Core tracks them."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import track_moe_metrics
from megatron.core.transformer.transformer_config import TransformerConfig

NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def take_aux_losses(config: TransformerConfig, micro_batches: int) -> dict[str, float]:
    """Mean auxiliary losses since the last call, over MoE layers, micro-batches and ranks.

    Args:
        config: of the model.
        micro_batches: micro-batches each rank has run since then.

    Returns:
        Megatron-LM's name -> value; empty for a model without any.

    """
    if not config.num_moe_experts:
        return {}
    types = config.moe_router_load_balancing_type
    coefficients = config.moe_aux_loss_coeff
    if isinstance(types, str):
        types, coefficients = [types], [coefficients]
    names = [
        NAMES[kind]
        for kind, coefficient in zip(types, coefficients, strict=True)
        if kind in NAMES and coefficient
    ]
    if config.moe_z_loss_coeff is not None:
        names.append("z_loss")
    if not names:
        return {}
    losses: dict[str, torch.Tensor] = {}
    track_moe_metrics(
        1.0 / micro_batches,
        iteration=0,
        total_loss_dict=losses,
        force_initialize=True,
        track_names=names,
        num_layers=config.num_layers,
        moe_layer_freq=config.moe_layer_freq,
    )
    return {name: float(loss) for name, loss in losses.items()}
