"""From a RunConfig to Megatron-Core's own configuration objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_dynmix.config.megatron_fields import model_settings
from megatron_dynmix.config.megatron_fields import moe_layers as moe_layers
from megatron_dynmix.config.rotary import SETTINGS, TRUNCATED, yarn_of
from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Return the GELU by way of tanh, `gelu_new` of `transformers` (Hendrycks and Gimpel 2016)."""
    return torch.nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu-tanh": gelu_tanh, "quick-gelu": quick_gelu}
STAGE_SETTINGS = (
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)
"""Settings of the model section that speak of pipeline stages."""


def _part(settings: Mapping[str, Any], owner: type) -> dict[str, Any]:
    """Return the settings that are fields of `owner`."""
    return {field.name: settings[field.name] for field in dataclasses.fields(owner) if field.name in settings}


def check_with_megatron(config: RunConfig) -> None:
    """Refuse what only Megatron-Core knows cannot work, in its words; `check` has looked at the rest."""
    transformer_config(config)
    optimizer_config(config)


def params_dtype(config: RunConfig) -> torch.dtype:
    """Return the type of parameters and activations."""
    return torch.bfloat16 if config.training.bf16 else torch.float32


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Return Megatron-Core's model configuration, layout included."""
    layout = _part(config.parallel.megatron, ModelParallelConfig)
    residual_in_fp32 = bool(config.model.megatron.get("fp32_residual_connection"))
    derived: dict[str, Any] = {
        "activation_func": ACTIVATIONS[config.model.activation],
        "calculate_per_token_loss": True,
        "bf16": config.training.bf16,
        "params_dtype": params_dtype(config),
        # what stages hand on: the residual connection
        "pipeline_dtype": torch.float32 if residual_in_fp32 else params_dtype(config),
    }
    if config.model.qk_layernorm_full_width:
        derived["qk_layernorm"] = True  # from 0.18 on, Megatron-Core refuses a spec that has norms otherwise
    if config.model.freeze_router:
        derived["moe_router_bias_update_rate"] = 0.0  # an expert bias is a router's too
    if config.parallel.virtual_stages:
        layout["overlap_p2p_comm"] = config.parallel.overlap_p2p_comm
        layout.setdefault("batch_p2p_comm", not layout["overlap_p2p_comm"])
    if "attention_backend" in config.model.megatron:
        derived["attention_backend"] = AttnBackend[config.model.megatron["attention_backend"]]
    kind, given, yarn = TransformerConfig, dict(config.model.megatron), None
    if given.get("multi_latent_attention"):
        kind = MLATransformerConfig
        derived |= {name: getattr(config.model, name) for name in ("rotary_base", "rotary_percent")}
    else:
        yarn = yarn_of(given)
        given = {name: value for name, value in given.items() if name not in SETTINGS}
    try:
        transformer = kind(**{**layout, **given, **derived})
    except (ValueError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"Megatron-Core refuses the model or its layout: {error}") from error
    if yarn is not None:  # Megatron-Core's GPT looks for them there, and its attention for the first
        vars(transformer).update({f"yarn_{name}": value for name, value in yarn.items()})
        setattr(transformer, TRUNCATED, config.model.yarn_correction_range_round_to_int)
    return transformer


def ddp_config(config: RunConfig) -> DistributedDataParallelConfig:
    """Return Megatron-Core's data-parallel configuration: gradients are reduced in float32."""
    given = _part(config.parallel.megatron, DistributedDataParallelConfig)
    ours = {
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
        # as Megatron-LM: all stages of an interleaved pipeline gather together
        "align_param_gather": bool(given.get("overlap_param_gather") and config.parallel.virtual_stages),
    }
    return DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **ours, **given})


def optimizer_config(config: RunConfig) -> OptimizerConfig:
    """Return Megatron-Core's optimizer configuration."""
    ours, model = config.optimizer, model_settings(config)
    try:
        return OptimizerConfig(
            **{**ours.megatron, "lr": ours.lr, "min_lr": ours.min_lr, "weight_decay": ours.weight_decay},
            bf16=config.training.bf16,
            params_dtype=params_dtype(config),
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_param_gather=bool(config.parallel.megatron.get("overlap_param_gather")),
            fp8_recipe=model.fp8_recipe if model.fp8 else None,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"Megatron-Core refuses the optimizer settings: {error}") from error


def padded_vocab_size(config: RunConfig) -> int:
    """Return the rows of the embedding in memory: a multiple of what every tensor-parallel rank gets."""
    assert config.model.vocab_size is not None, "the preset gives one"
    multiple = config.model.make_vocab_size_divisible_by * config.parallel.size("tensor_model_parallel_size")
    return -(-config.model.vocab_size // multiple) * multiple


def micro_batch_group(transformer: TransformerConfig) -> int:
    """Return the micro-batches that the interleaved pipeline runs at a time; 1 without it."""
    interleaved = bool(transformer.virtual_pipeline_model_parallel_size)
    return int(transformer.microbatch_group_size_per_vp_stage) if interleaved else 1
