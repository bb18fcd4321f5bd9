"""Parameters of each rank, from the configuration alone: exactly those that Megatron-Core builds.

Counts are kept apart where they are divided in another way: `dense` parameters are replicated over the
data-parallel ranks, `expert` parameters over the expert-data-parallel ones.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_dynmix import platform
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.host import Host, without_unmet
from megatron_dynmix.config.megatron import moe_layers, padded_vocab_size, transformer_config
from megatron_dynmix.errors import InputError

UNKNOWN = (
    "mtp_num_layers",
    "experimental_attention_variant",
    "attention_output_gate",
    "heterogeneous_block_specs",
    "moe_latent_size",
)
"""Settings that give layers other parameters than are counted here."""


@dataclass(frozen=True)
class Parameters:
    """How many numbers are learned."""

    dense: int
    expert: int

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.expert + other.expert)

    @property
    def total(self) -> int:
        """Return both together."""
        return self.dense + self.expert


@dataclass(frozen=True)
class Shards:
    """Ranks that a layer is divided over."""

    tp: int = 1
    etp: int = 1
    ep: int = 1


def this_host() -> Host:
    """Return what the ranks of a run on this machine have."""
    here = platform.start()
    return Host(
        cuda=here.device.type == "cuda",
        transformer_engine=here.transformer_engine,
        transformer_engine_error=here.transformer_engine_error,
    )


def transformer_here(config: RunConfig) -> TransformerConfig:
    """Return Megatron-Core's configuration, without ways to compute that this machine cannot name to it."""
    return transformer_config(without_unmet(config, this_host()))


def stage_layers(transformer: TransformerConfig, stage: int) -> list[list[int]]:
    """Return the decoder layers of a pipeline stage, from 0, by virtual chunk: `[[0, 1], [4, 5]]`."""
    chunks = transformer.virtual_pipeline_model_parallel_size
    found = []
    for chunk in range(chunks) if chunks else [None]:
        count = get_num_layers_to_build(transformer, vp_stage=chunk, pp_rank=stage)
        first = get_transformer_layer_offset(transformer, vp_stage=chunk, pp_rank=stage)
        found.append(list(range(first, first + count)))
    return found


def stage_parameters(config: RunConfig, transformer: TransformerConfig, stage: int) -> Parameters:
    """Return the parameters of one rank of a pipeline stage; stages are counted from 0."""
    _refuse_unknown(transformer)
    shards = Shards(
        tp=transformer.tensor_model_parallel_size,
        etp=int(transformer.expert_tensor_parallel_size or 1),
        ep=transformer.expert_model_parallel_size,
    )
    routed = set(moe_layers(transformer))
    total = Parameters(0, 0)
    for layer in itertools.chain(*stage_layers(transformer, stage)):
        total += _layer(config, transformer, shards, is_moe=layer in routed)
    words = padded_vocab_size(config) // shards.tp * transformer.hidden_size
    if stage == 0:
        total += Parameters(words, 0)
    if stage == transformer.pipeline_model_parallel_size - 1:
        total += Parameters(_norm(transformer, transformer.hidden_size), 0)
        # Tied weights of a model on one stage are the embedding's; on several, the last has a copy.
        if config.model.untie_embeddings_and_output_weights or stage > 0:
            total += Parameters(words, 0)
    return total


def model_parameters(config: RunConfig, *, active: bool = False) -> int:
    """Return the parameters of the model as it is published: no padding, nothing held twice.

    `active` are only those that a token meets: of the experts, those that it is routed to.
    """
    transformer = transformer_here(config)
    _refuse_unknown(transformer)
    assert config.model.vocab_size is not None, "the preset gives one"
    routed = set(moe_layers(transformer))
    tables = 1 + config.model.untie_embeddings_and_output_weights
    total = tables * config.model.vocab_size * transformer.hidden_size
    total += _norm(transformer, transformer.hidden_size)
    for layer in range(transformer.num_layers):
        part = _layer(config, transformer, Shards(), is_moe=layer in routed)
        experts = int(transformer.num_moe_experts or 1)
        total += part.dense + (
            part.expert // experts * transformer.moe_router_topk if active else part.expert
        )
        if active and config.model.attention_experts is not None:
            idle = config.model.attention_experts - transformer.num_attention_heads
            total -= idle * _attention_expert(transformer)
    return total


def _refuse_unknown(transformer: TransformerConfig) -> None:
    for name in UNKNOWN:
        if getattr(transformer, name, None):
            raise InputError(
                f"{name} is {getattr(transformer, name)}: the parameters of such a model are not known "
                "before it is built, so its memory cannot be planned"
            )


def _layer(config: RunConfig, transformer: TransformerConfig, shards: Shards, *, is_moe: bool) -> Parameters:
    """Count one rank's part of a decoder layer."""
    hidden = transformer.hidden_size
    dense = 2 * _norm(transformer, hidden) + _attention(config, transformer, shards.tp)
    if not is_moe:
        return Parameters(dense + _mlp(transformer, transformer.ffn_hidden_size, shards.tp), 0)
    experts = int(transformer.num_moe_experts or 0)
    dense += _router(config, transformer, experts)
    if shared := transformer.moe_shared_expert_intermediate_size:
        dense += _mlp(transformer, shared, shards.tp) + hidden * bool(transformer.moe_shared_expert_gate)
    width = int(transformer.moe_ffn_hidden_size or transformer.ffn_hidden_size)
    return Parameters(dense, experts // shards.ep * _mlp(transformer, width, shards.etp))


def _norm(transformer: TransformerConfig, width: int) -> int:
    return width * (2 if transformer.normalization == "LayerNorm" else 1)


def _attention(config: RunConfig, transformer: TransformerConfig, tp: int) -> int:
    if isinstance(transformer, MLATransformerConfig):
        return _latent_attention(transformer, tp)
    if (experts := config.model.attention_experts) is not None:  # whole on every rank
        return experts * _attention_expert(transformer) + _router(config, transformer, experts)
    hidden, head = transformer.hidden_size, int(transformer.kv_channels or 0)
    queries = transformer.num_attention_heads * head
    keys = int(transformer.num_query_groups or 0) * head
    fused = queries + 2 * keys
    total = hidden * fused // tp + queries * hidden // tp
    if transformer.add_bias_linear or transformer.add_qkv_bias:
        total += fused // tp
    if transformer.add_bias_linear:
        total += hidden
    if transformer.softmax_type == "learnable":
        total += transformer.num_attention_heads // tp
    if config.model.qk_layernorm_full_width:
        total += _norm(transformer, queries) + _norm(transformer, keys)
    elif transformer.qk_layernorm:
        total += 2 * _norm(transformer, head)
    return total


def _attention_expert(transformer: TransformerConfig) -> int:
    """Count an expert that projects queries and outputs, of one head."""
    return 2 * transformer.hidden_size * int(transformer.kv_channels or 0)


def _latent_attention(transformer: MLATransformerConfig, tp: int) -> int:
    """Count attention by way of latents, whose projections each tensor-parallel rank has whole."""
    hidden, heads = transformer.hidden_size, transformer.num_attention_heads
    latents = [rank for rank in (transformer.kv_lora_rank, transformer.q_lora_rank) if rank]
    whole = hidden * (sum(latents) + transformer.qk_pos_emb_head_dim)
    if transformer.qk_layernorm:
        whole += sum(_norm(transformer, latent) for latent in latents)
    if transformer.add_bias_linear:
        whole += hidden
    query_width = transformer.qk_head_dim + transformer.qk_pos_emb_head_dim
    queries = query_width * (transformer.q_lora_rank or hidden)
    keys_values = (transformer.qk_head_dim + transformer.v_head_dim) * transformer.kv_lora_rank
    return whole + heads * (queries + keys_values + transformer.v_head_dim * hidden) // tp


def _router(config: RunConfig, transformer: TransformerConfig, experts: int) -> int:
    if (width := config.model.router_width) is not None:  # two matrices, and a bias between
        return width * (transformer.hidden_size + 1 + experts)
    total = experts * (transformer.hidden_size + transformer.add_bias_linear)
    if config.model.router_network == "mlp":
        total += experts * experts
        if config.model.router_noise is not None:
            total += experts * transformer.hidden_size
    return total


def _mlp(transformer: TransformerConfig, width: int, tp: int) -> int:
    """Count both linear layers of one MLP or expert: the first has two outputs where it is gated."""
    hidden, first = transformer.hidden_size, width * (2 if transformer.gated_linear_unit else 1)
    biases = first // tp + hidden if transformer.add_bias_linear else 0
    return (first + width) * hidden // tp + biases
