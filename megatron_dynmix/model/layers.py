"""The classes that Megatron-Core builds a decoder layer from, and those of them that are ours.

Ours are attention and norms of layers without Transformer Engine, on CPU and GPU alike. Axes: S sequence,
B batch, N heads, H head width, Q queries, K keys.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_dynmix import platform
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.host import joins_rows
from megatron_dynmix.config.run_config import ModelConfig
from megatron_dynmix.model.expert_attention import ExpertAttention
from megatron_dynmix.model.scales import scale_residual
from megatron_dynmix.moe.gelu_router import GeluRouter
from megatron_dynmix.moe.mlp_router import MlpRouter
from megatron_dynmix.moe.router import GateLoadRouter
from megatron_dynmix.platform.versions import keep_query_projection, moe_parts

LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
"""Norms of the latents, here -> in a checkpoint."""


def decoder_spec(
    config: RunConfig, transformer: TransformerConfig, transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the spec of a (virtual) pipeline stage's layers: Megatron-Core's own, with a router of ours.

    Without Transformer Engine, attention and norms are those of this file; with it, attention is where rows
    are not joined.
    """
    model = config.model
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer_engine,
        normalization=transformer.normalization,
        vp_stage=vp_stage,
    )
    block = copy.deepcopy(block)  # Megatron-Core shares parts between specs
    if transformer.multi_latent_attention:
        keep_query_projection()
    router = _router(model)
    if not transformer_engine:
        block.layer_norm = LocalNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        if (moe := moe_parts(parts.mlp)) is not None:
            moe.router = router
        if model.attention_experts is not None:
            _use_expert_attention(
                parts, {"experts": model.attention_experts, "router": router}, transformer_engine
            )
        elif not transformer_engine:
            _use_local_layers(parts, transformer)
        elif not joins_rows(config, transformer_engine):
            parts.self_attention.submodules.core_attention = SegmentAttention
        if model.qk_layernorm_full_width:
            attention = parts.self_attention.submodules
            attention.q_layernorm = ModuleSpec(FullWidthNorm, {"heads": "num_attention_heads"})
            attention.k_layernorm = ModuleSpec(FullWidthNorm, {"heads": "num_query_groups"})
        if model.residual_multiplier != 1:
            scale_residual(parts, model.residual_multiplier)
    return block


def _router(model: ModelConfig) -> Any:
    """Return what builds the routers of a model, from a configuration of Megatron-Core's."""
    if model.router_network == "mlp":
        return functools.partial(MlpRouter, noise=model.router_noise)
    if model.router_network == "gelu":
        assert model.router_width is not None, "`check` has seen to it"
        return functools.partial(GeluRouter, width=model.router_width)
    return GateLoadRouter


def _use_expert_attention(parts: Any, params: dict[str, Any], transformer_engine: bool) -> None:
    """Attend with experts; no projection is there whose kernel could hold the norm before it."""
    if not transformer_engine:
        parts.pre_mlp_layernorm = LocalNorm
    parts.input_layernorm = parts.pre_mlp_layernorm
    parts.self_attention = ModuleSpec(module=ExpertAttention, params=params)
    parts.sharded_state_dict_keys_map = {}


def _use_local_layers(parts: Any, transformer: TransformerConfig) -> None:
    parts.input_layernorm = parts.pre_mlp_layernorm = LocalNorm
    attention = parts.self_attention.submodules
    attention.core_attention = SegmentAttention
    if transformer.multi_latent_attention:
        if transformer.qk_layernorm:
            attention.q_layernorm = IdentityOp if transformer.q_lora_rank is None else LocalNorm
            attention.kv_layernorm = LocalNorm
        # Whole on every tensor-parallel rank: with a column-parallel one, what the rotary part of the keys
        # learns from the other ranks' heads would be missing from its gradient.
        attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
        # Transformer Engine's layers hold these norms, and their checkpoints say so
        parts.sharded_state_dict_keys_map = dict(LATENT_NORMS)
        if moe_parts(parts.mlp) is None:
            parts.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        return
    if transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = LocalNorm
    if moe_parts(parts.mlp) is not None:
        # The local spec renames this key in checkpoints as if the layer were dense; Transformer Engine's
        # does not, and a checkpoint must not tell where it was written.
        parts.sharded_state_dict_keys_map = {
            old: new for old, new in parts.sharded_state_dict_keys_map.items() if old != "pre_mlp_layernorm."
        }


class SegmentAttention(DotProductAttention):
    """Core attention on `scaled_dot_product_attention`, for rows that hold several segments.

    Takes either the block-diagonal mask `[B, 1, S, S]` (True = masked) or, as Transformer Engine does,
    rows joined to one sequence with `PackedSeqParams`. Under context parallelism each rank has the queries
    of its part of the sequence and gathers the keys and values of all: it takes the mask. Layers may look
    back no further than a window, and a softmax may have a sink (gpt-oss).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        cp_comm_type: str | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        # The parent refuses context parallelism, which it knows nothing of, and reads nothing else of it.
        # Nor does it take the widths of latent attention's keys and values, which the tensors tell.
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        self._gathers = config.context_parallel_size > 1
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        )
        self._before = config.window_size[0] if windowed and config.window_size[0] >= 0 else None
        """Keys before its own that a query sees; None for all."""
        if isinstance(self.softmax_offset, torch.nn.Parameter):
            # each tensor-parallel rank has those of its heads, and the norm of gradients must know
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend causally inside each segment; return `[S, B, N * H]`, or `[T, N * H]` when packed.

        Queries are `[S, B, N, H]`, or `[T, N, H]` when packed; keys and values likewise, with fewer heads
        under grouped-query attention. The mask has a row for each query, and columns in the order of the
        gathered keys; without one, attention is causal over the whole row. `attn_mask_type` is not read.
        """
        assert attention_bias is None, "attention bias is not used by this model"
        if packed_seq_params is not None:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            position = torch.arange(query.shape[0], device=query.device)
            segment = torch.bucketize(position, packed_seq_params.cu_seqlens_q[1:], right=True)
            attention_mask = segment_mask(segment[None], position, position)
        if self._gathers:
            assert attention_mask is not None and packed_seq_params is None, "the mask says who is where"
            ranks = parallel_state.get_context_parallel_group()
            key = gather_from_sequence_parallel_region(key.contiguous(), group=ranks)
            value = gather_from_sequence_parallel_region(value.contiguous(), group=ranks)
        allowed = None if attention_mask is None else ~attention_mask
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        sinks_N = self.softmax_offset
        if self._before is not None or (sinks_N is not None and allowed is None):
            allowed = self._in_window(allowed, query.shape[2], query.device)
        if sinks_N is not None:
            assert allowed is not None, "made above"
            allowed = torch.nn.functional.pad(allowed, (0, 1), value=True)
            query, key, value = with_sinks(query, key, value, sinks_N.to(query.device) / self.softmax_scale)
        dropout = self.attention_dropout.p if self.training else 0.0
        fork = dropout > 0.0 and not self.config.sequence_parallel  # as the parent does
        with get_cuda_rng_tracker().fork() if fork else contextlib.nullcontext():
            context = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=allowed,
                is_causal=allowed is None,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        context = context.permute(2, 0, 1, 3).flatten(start_dim=2)
        return context.squeeze(1) if packed_seq_params is not None else context

    def _in_window(self, allowed: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor:
        """Return which keys of those allowed, `[B, 1, Q, K]`, a query sees; without any, of all before it."""
        assert not self._gathers, "windows are refused under context parallelism"
        position = torch.arange(length, device=device)
        before_QK = position[:, None] - position
        seen_QK = before_QK >= 0
        if self._before is not None:
            seen_QK = seen_QK & (before_QK <= self._before)
        return seen_QK[None, None] if allowed is None else allowed & seen_QK


SINK_WIDTH = 8
"""Numbers by which sinks widen a head, one of them used: kernels want widths that divide by it."""


def with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add a last key to `[B, G, K, D]`, whose product with a head's queries `[B, N, Q, D]` is in `sinks_N`.

    Its value is 0, so it takes its share of the softmax (Xiao et al. 2023, arXiv 2309.17453) and gives
    nothing. Queries end in the number that it answers to, all other keys in 0 there.
    """
    pad = torch.nn.functional.pad
    tail = sinks_N.to(query.dtype)[None, :, None, None].expand(*query.shape[:3], 1)
    query = torch.cat([query, pad(tail, (0, SINK_WIDTH - 1))], dim=-1)
    width = key.shape[-1]
    key = pad(key, (0, SINK_WIDTH, 0, 1))
    key[..., -1, width] = 1.0
    return query, key, pad(value, (0, 0, 0, 1))


def segment_mask(segment_BS: torch.Tensor, query_Q: torch.Tensor, key_K: torch.Tensor) -> torch.Tensor:
    """Return the mask `[B, 1, Q, K]` of rows that hold several segments: True = another segment, or later.

    Queries and keys are given by their positions. Padding is a segment too, so that no position is left
    without anything to attend to.
    """
    later_QK = key_K[None, :] > query_Q[:, None]
    return ((segment_BS[:, query_Q, None] != segment_BS[:, None, key_K]) | later_QK)[:, None]


class LocalNorm:
    """Builds torch's RMSNorm or LayerNorm so that it also works with sequence parallelism.

    Megatron-Core's own wrapper refuses sequence parallelism, though all it takes is the attribute that
    tells `finalize_model_grads` to sum the weight's gradient over the tensor-parallel ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> Any:
        """Return the torch norm itself, on this rank's device."""
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps).to(device=platform.start().device, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class FullWidthNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads together, as OLMoE has it (its `q_norm` and `k_norm`).

    `heads` is the setting that says how many there are. Every tensor-parallel rank holds the weight of all:
    Megatron-Core sums its gradient over them, as that of a norm of each head.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, *, heads: str, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__()
        self.heads, self.ranks = getattr(config, heads), config.tensor_model_parallel_size
        self.norm = LocalNorm(config, self.heads * hidden_size, eps)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Normalize over the last two axes of `[S, B, N, H]`; N may be a rank's part of the heads."""
        if self.ranks == 1:
            return self.norm(heads.flatten(start_dim=-2)).view_as(heads)
        # As many numbers on each rank, and each head on as many ranks, even if they are more than KV groups:
        # so the mean over the ranks is that over the heads. Its gradient is what it does to all ranks' heads.
        wide = heads.float()
        square = wide.square().mean(dim=(-2, -1), keepdim=True) / self.ranks
        square = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(square))
        first = parallel_state.get_tensor_model_parallel_rank() * self.heads // self.ranks
        weight = self.norm.weight.view(self.heads, -1)[first : first + heads.shape[-2]]
        return (wide * torch.rsqrt(square + self.norm.eps)).to(heads.dtype) * weight


def set_latent_epsilon(gpt: torch.nn.Module, epsilon: float) -> None:
    """Give the norms of latent attention's latents an epsilon of their own; Megatron-Core has one for all.

    With Transformer Engine they are parts of the projections that follow.
    """
    holders = ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj")
    for attention in gpt.modules():
        for part in (getattr(attention, name, None) for name in holders):
            if part is not None and hasattr(part, "eps"):
                part.eps = epsilon
