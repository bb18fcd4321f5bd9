"""Which classes Megatron-Core builds a decoder layer from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmix.model.local_layers import (
    FullWidthKeyNorm,
    FullWidthQueryNorm,
    LocalNorm,
    SegmentAttention,
)
from megatron_dynmix.moe.router import GateLoadRouter

LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
"""Norms of the latents, here -> in a checkpoint."""


def decoder_spec(
    transformer: TransformerConfig,
    *,
    transformer_engine: bool,
    qk_layernorm_full_width: bool,
    router: Callable[..., GateLoadRouter] = GateLoadRouter,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Return the spec of a (virtual) pipeline stage's layers: Megatron-Core's own, with a router of ours.

    Without Transformer Engine, attention and norms are those of `local_layers.py`; with it and context
    parallelism, attention is.
    """
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer_engine,
        normalization=transformer.normalization,
        vp_stage=vp_stage,
    )
    block = copy.deepcopy(block)  # Megatron-Core shares parts between specs
    if not transformer_engine:
        block.layer_norm = LocalNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        if parts.mlp.module is MoELayer:
            parts.mlp.submodules.router = router
        if not transformer_engine:
            _use_local_layers(parts, transformer)
        elif not joins_rows(transformer_engine, transformer.context_parallel_size):
            parts.self_attention.submodules.core_attention = SegmentAttention
        if qk_layernorm_full_width:
            attention = parts.self_attention.submodules
            attention.q_layernorm, attention.k_layernorm = FullWidthQueryNorm, FullWidthKeyNorm
    return block


def joins_rows(transformer_engine: bool, context_parallel_size: int) -> bool:
    """Whether attention takes all rows of a micro-batch as one sequence, with the borders of the segments.

    Otherwise it takes a block-diagonal mask. Under context parallelism Transformer Engine wants every
    segment padded to a multiple of 2 x ranks: the rows, and so their order, would depend on the layout.
    """
    return transformer_engine and context_parallel_size == 1


def _use_local_layers(parts: Any, transformer: TransformerConfig) -> None:
    parts.input_layernorm = parts.pre_mlp_layernorm = LocalNorm
    attention = parts.self_attention.submodules
    attention.core_attention = SegmentAttention
    if transformer.multi_latent_attention:
        if transformer.qk_layernorm:
            attention.q_layernorm = attention.kv_layernorm = LocalNorm
        # Whole on every tensor-parallel rank: with a column-parallel one, what the rotary part of the keys
        # learns from the other ranks' heads would be missing from its gradient.
        attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
        # Transformer Engine's layers hold these norms, and their checkpoints say so
        parts.sharded_state_dict_keys_map = dict(LATENT_NORMS)
        if parts.mlp.module is not MoELayer:
            parts.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        return
    if transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = LocalNorm
    if parts.mlp.module is MoELayer:
        # The local spec renames this key in checkpoints as if the layer were dense; Transformer Engine's
        # does not, and a checkpoint must not tell where it was written.
        parts.sharded_state_dict_keys_map = {
            old: new for old, new in parts.sharded_state_dict_keys_map.items() if old != "pre_mlp_layernorm."
        }
