"""Memory of each rank, by pipeline stage: what the theoretical memory report of Megatron-LM sums, for MoE.

Model states are those of Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054, section 3.1) for Adam in mixed
precision, with gradients summed in float32 as here: 2 bytes of parameters, 4 of gradients and 12 of
optimizer (master weights, both moments), 18 a parameter; the distributed optimizer (ZeRO stage 1) divides
the 12 by the replicas. In float32 there are no master weights: 4 + 4 + 8. Experts are divided over EP x ETP
ranks and have replicas of their own.

Activations that a rank keeps for the backward pass are estimated layer by layer. Korthikanti et al. 2022
(arXiv 2205.05198, section 4) count what each part of a layer keeps: for a dense GPT layer with sequence
parallelism 34 s b h / t bytes in 16 bits, and 5 a s^2 b / t more for attention that keeps its scores. Here
the same count is made of what Megatron-Core 0.16.1 runs: grouped-query attention that keeps no scores, gated
MLPs and routed experts. Of the T tokens of a micro-batch on a context-parallel rank, each of its t
tensor-parallel ranks has T/t; with a router in balance it sends k T/t of them to experts and gets as many,
`etp` times as many where experts are tensor-parallel themselves. Counts of activations are elements of
`params_dtype` unless said otherwise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.host import Host, joins_rows, with_defaults
from megatron_dynmix.config.megatron import (
    ddp_config,
    micro_batch_group,
    moe_layers,
    padded_vocab_size,
    params_dtype,
)
from megatron_dynmix.plan.layout import Layout
from megatron_dynmix.plan.parameters import Parameters, stage_layers, stage_parameters, transformer_here

FP32 = 4
MASTER, MOMENTS = 4, 8
"""Bytes of the optimizer for each parameter."""
OVERHEAD_BYTES = 2 * 2**30
"""What no formula has on a GPU: the CUDA context, NCCL's buffers, workspaces of the libraries."""
FRAGMENTATION = 1.05
"""What the allocator holds over what is in use, with room for rows of experts that get more than others."""


INDEX_BYTES = 72
"""Of a pair of a token and an attention expert: its token, its expert, its places and its weight."""


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank of a pipeline stage."""

    layers: int
    """Kept by the layers of all micro-batches whose backward pass is still to come."""
    working: int
    """Bytes of the one layer whose forward pass is done again, with full recomputation."""
    logits: int
    """Bytes of the last stage: the logits in bf16, and what the loss makes of them in float32."""

    @property
    def total(self) -> int:
        """Return the peak: logits are gone before a layer's forward pass is done again."""
        return self.layers + max(self.working, self.logits)


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on each rank of a pipeline stage."""

    stage: int
    layers: int
    parameters: Parameters
    """How many, not bytes."""
    weights: int
    gradients: int
    optimizer: int
    activations: Activations

    @property
    def total(self) -> int:
        """Return what the formulas give."""
        return self.weights + self.gradients + self.optimizer + self.activations.total

    @property
    def needed(self) -> int:
        """Return what a GPU should have: the total, fragmentation and what the libraries hold."""
        return int(self.total * FRAGMENTATION) + OVERHEAD_BYTES

    def as_json(self) -> dict[str, int]:
        """Return all of it by name."""
        sums = {"parameters": self.parameters.total, "activations": self.activations.total}
        return {**dataclasses.asdict(self), **sums, "total": self.total, "needed": self.needed}


def memory_by_stage(config: RunConfig, layout: Layout, host: Host) -> list[StageMemory]:
    """Return the memory of a rank of each pipeline stage, for a configuration that was checked."""
    config = with_defaults(config, host)
    transformer, found = transformer_here(config), []
    weights = params_dtype(config).itemsize
    gradients = FP32 if ddp_config(config).grad_reduce_in_fp32 else weights
    count = layout.micro_batches(config)
    for stage in range(layout.pp):
        parameters = stage_parameters(config, transformer, stage)
        memory = StageMemory(
            stage=stage,
            layers=sum(map(len, stage_layers(transformer, stage))),
            parameters=parameters,
            weights=weights * parameters.total,
            gradients=gradients * parameters.total,
            optimizer=_optimizer_bytes(config, layout, parameters),
            activations=stage_activations(
                *(config, transformer, layout, host), stage=stage, micro_batches=count
            ),
        )
        found.append(memory)
    return found


def _optimizer_bytes(config: RunConfig, layout: Layout, parameters: Parameters) -> int:
    """Return the bytes of one rank; each instance shards over its data- and context-parallel ranks."""
    instances = config.parallel.size("num_distributed_optimizer_instances")
    each, replicas = _bytes_per_parameter(config), layout.dp * layout.cp // instances
    if not config.parallel.use_distributed_optimizer:
        return each * parameters.total
    # Without expert parallelism Megatron-Core keeps experts in the same buffers as everything else.
    of_experts = layout.expert_dp // instances if layout.ep > 1 else replicas
    return -(-each * parameters.dense // replicas) + -(-each * parameters.expert // of_experts)


def _bytes_per_parameter(config: RunConfig) -> int:
    """Return the bytes of optimizer state for a parameter that is not sharded."""
    return MOMENTS + (MASTER if config.training.bf16 else 0)


def checkpoint_bytes(config: RunConfig, parameters: int) -> int:
    """Return the size of a checkpoint: weights and optimizer state of every parameter, once."""
    return parameters * (params_dtype(config).itemsize + _bytes_per_parameter(config))


def stage_activations(
    config: RunConfig,
    transformer: TransformerConfig,
    layout: Layout,
    host: Host,
    *,
    stage: int,
    micro_batches: int,
) -> Activations:
    """Return the activations of one rank of a pipeline stage, with that many micro-batches a step."""
    layer = Layer(config, transformer, layout, host)
    chunks, routed = stage_layers(transformer, stage), set(moe_layers(transformer))
    in_flight = passes_in_flight(transformer, stage, micro_batches)
    kept, whole = 0, [0]
    for number, layers in enumerate(chunks):
        alive = (in_flight - number + len(chunks) - 1) // len(chunks)
        for place, index in enumerate(layers):
            full = layer.bytes_kept(is_moe=index in routed)
            whole.append(full)
            kept += alive * _kept_of_layer(transformer, place, full, layer.border)
    logits = 0
    if stage == layout.pp - 1:
        kept += layer.norm_copies * layer.border  # the last norm, and the output layer's input
        width = layer.tokens * padded_vocab_size(config) // layout.tp
        # the softmax, whose gradient is written in its place; it takes that of logits in float32
        logits = width * (FP32 if layer.element == FP32 else layer.element + FP32)
    working = max(whole) if transformer.recompute_granularity == "full" else 0
    return Activations(kept, working, logits)


def passes_in_flight(transformer: TransformerConfig, stage: int, micro_batches: int) -> int:
    """Return how many forward passes of chunks at most await their backward pass.

    1F1B begins with p - 1 - i passes on stage i before the first that goes back at once; the interleaved
    schedule with 2 (p - 1 - i) + (v - 1) g, g micro-batches to a group (Narayanan et al. 2021).
    """
    stages = transformer.pipeline_model_parallel_size
    chunks = transformer.virtual_pipeline_model_parallel_size or 1
    ahead = stages - 1 - stage
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * micro_batch_group(transformer)
    return min(ahead + 1, micro_batches * chunks)


def _kept_of_layer(transformer: TransformerConfig, place: int, full: int, border: int) -> int:
    """Return the bytes that a layer keeps under full recomputation: all, its input (`border`) or nothing.

    `place` is that of the layer in its stage or chunk, from 0.
    """
    if transformer.recompute_granularity != "full":
        return full
    several = int(transformer.recompute_num_layers or 1)
    if transformer.recompute_method == "block":
        return border if place < several else full
    return border if place % several == 0 else 0  # uniform: only the input of each group of layers


@dataclass(frozen=True)
class Layer:
    """What one decoder layer keeps of one micro-batch on one rank."""

    config: RunConfig
    transformer: TransformerConfig
    layout: Layout
    host: Host

    @property
    def element(self) -> int:
        """Return the bytes of an activation."""
        return params_dtype(self.config).itemsize

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch on a context-parallel rank."""
        return self.config.data.seq_length * self.config.training.micro_batch_size // self.layout.cp

    @property
    def border(self) -> int:
        """Return the bytes that pass from layer to layer: a slice of the sequence on each TP rank."""
        return self.element * self.tokens // self.layout.tp * self.transformer.hidden_size

    @property
    def norm_copies(self) -> int:
        """Count input and output of a norm; RMSNorm on a CPU has float32 copies: input and normalised."""
        if self.host.cuda or self.transformer.normalization == "LayerNorm":
            return 2
        return 1 + 2 * FP32 // self.element

    def bytes_kept(self, *, is_moe: bool) -> int:
        """Return the bytes in all, selective recomputation taken into account."""
        again, hidden = self._again, self.transformer.hidden_size
        norms = 2 * (self.norm_copies - ("layernorm" in again))
        elements, extra_bytes = norms * hidden + self._attention(again), 0  # for each token
        if is_moe and "moe" not in again:
            elements += self._moe(again)
            extra_bytes = self._router_bytes(int(self.transformer.num_moe_experts or 0))
        elif not is_moe and "mlp" not in again:
            elements += self._mlp(self.transformer.ffn_hidden_size, weighted=False)
        if (experts := self.config.model.attention_experts) is not None:
            extra_bytes += self._router_bytes(experts) + INDEX_BYTES * self.transformer.num_attention_heads
        if self.transformer.hidden_dropout:
            extra_bytes += 2 * hidden  # two masks, a byte each
        here = self.tokens // self.layout.tp
        return here * (self.element * elements + extra_bytes) + self.element * self._attention_extras(again)

    @property
    def _again(self) -> set[str]:
        if self.transformer.recompute_granularity != "selective":
            return set()
        # As given: not every machine can name all of them to Megatron-Core.
        given = self.config.model.megatron.get("recompute_modules")
        return set(given or self.transformer.recompute_modules or ())

    def _attention(self, again: set[str]) -> int:
        """Count elements a token: what the projection put out, rotated queries and keys, and the output.

        The heads are divided over the tensor-parallel ranks, but each holds them for the whole sequence: that
        cancels out. Values are a view of what the projection put out, which so is kept whole.
        """
        if isinstance(self.transformer, MLATransformerConfig):
            return self._latent_attention(self.transformer, again)
        if self.config.model.attention_experts is not None:
            return self._expert_attention()
        head = int(self.transformer.kv_channels or 0)
        queries = self.transformer.num_attention_heads * head
        keys = int(self.transformer.num_query_groups or 0) * head
        if (
            self._keeps_scores
        ):  # queries, and keys and values repeated for each of them, in copies of their own
            elements = (2 + 2 * self.layout.cp) * queries
        else:
            elements = 3 * queries + 3 * keys + 2 * keys * self._copies_of_keys
        if self.transformer.qk_layernorm:
            elements += (self.norm_copies - 2) * (queries + keys)
        return elements

    @property
    def _copies_of_keys(self) -> int:
        """Count copies of a rank's keys and values: all gathered, or of the last ones in a ring of ranks."""
        return min(1, self.layout.cp - 1) if self._joins_rows else self.layout.cp - 1

    @property
    def _joins_rows(self) -> bool:
        return joins_rows(self.config, self.host.transformer_engine)

    def _latent_attention(self, transformer: MLATransformerConfig, again: set[str]) -> int:
        """Count elements a token: the latents with their norms, and the attention's inputs and output.

        With c and c' the widths of the latents, r of the rotary part and n heads, d and v wide: the norms
        keep their inputs and outputs, 2 c' + (2 c + r); queries and keys are put together from two parts and
        values copied, so that not what the projections put out is kept but 2 n (d + r) + n v; the output is
        n v more.
        """
        norms = self.norm_copies if transformer.qk_layernorm else 1
        latents = norms * (transformer.kv_lora_rank + (transformer.q_lora_rank or 0))
        heads = transformer.num_attention_heads
        keys = heads * (transformer.qk_head_dim + transformer.qk_pos_emb_head_dim)
        values = heads * transformer.v_head_dim
        elements = latents + transformer.qk_pos_emb_head_dim + values
        if "mla_up_proj" not in again:
            elements += 2 * keys + values
        return elements + (keys + values) * self._copies_of_keys

    def _expert_attention(self) -> int:
        """Count elements a token: of each of its experts input, query, context and output, and gathered keys.

        These are the values too; without other ranks, they are what the norm put out.
        """
        ranks = self.layout.tp * self.layout.cp
        gathered = ranks if ranks > 1 else 0
        return (4 * self.transformer.num_attention_heads + gathered) * self.transformer.hidden_size

    def _attention_extras(self, again: set[str]) -> int:
        """Count elements a micro-batch: rotary tables, and the mask where attention takes one."""
        if self.config.model.attention_experts is not None:
            return 0
        tables = 0
        if not self.config.model.megatron.get("apply_rope_fusion"):
            positions = self.config.data.seq_length // (1 if self._joins_rows else self.layout.cp)
            rotated = self.transformer.kv_channels
            if isinstance(self.transformer, MLATransformerConfig):
                rotated = self.transformer.qk_pos_emb_head_dim
            tables = 4 * positions * int(rotated or 0)
        if self._joins_rows or "core_attn" in again:
            return tables
        # scaled_dot_product_attention makes numbers of a mask, again in each layer, and keeps them
        heads = self.transformer.num_attention_heads // self.layout.tp if self._keeps_scores else 1
        return tables + heads * self.tokens * self.config.data.seq_length

    @property
    def _groups_queries(self) -> bool:
        heads = self.transformer.num_attention_heads
        latent = isinstance(self.transformer, MLATransformerConfig)
        return not latent and self.transformer.num_query_groups not in (None, heads)

    @property
    def _keeps_scores(self) -> bool:
        """Whether attention is multiplied out, so that scores are kept: no kernel of torch's takes it.

        On a CPU that is where values are not as wide as keys, on CUDA float32 with fewer keys than queries.
        """
        if self.host.cuda:
            return not self.config.training.bf16 and self._groups_queries
        if not isinstance(self.transformer, MLATransformerConfig):
            return False
        keys = self.transformer.qk_head_dim + self.transformer.qk_pos_emb_head_dim
        return keys != self.transformer.v_head_dim

    def _mlp(self, width: int, *, weighted: bool) -> int:
        """Count elements a token between the two linear layers of an MLP, and the input of the second.

        `width` is that of the second layer's input; an expert's output is weighted by the router.
        """
        gated = self.transformer.gated_linear_unit
        if self.transformer.bias_activation_fusion:
            return (3 if gated else 2) * width
        # gated: both halves, silu(one), the other + offset, their product; then the weighted product
        return ((5 if gated else 2) + weighted) * width

    def _moe(self, again: set[str]) -> int:
        """Count elements a token: of those sent out, as many as the rank's experts get."""
        transformer, elements = self.transformer, 0
        shared = transformer.moe_shared_expert_intermediate_size
        if shared and "shared_experts" not in again:
            elements += self._mlp(shared, weighted=False)
        width = int(transformer.moe_ffn_hidden_size or transformer.ffn_hidden_size)
        inside = self._mlp(width, weighted=True)
        if "moe_act" in again:
            inside = width * (2 if transformer.gated_linear_unit else 1)
        # ETP ranks gather each other's tokens, and divide the width: only the inputs are multiplied.
        return elements + transformer.moe_router_topk * (transformer.hidden_size * self.layout.etp + inside)

    def _router_bytes(self, experts: int) -> int:
        """Count bytes a token: the router's scores and its choice, and what noise that is learned multiplies.

        Else Megatron-Core makes a copy of its input in another precision again, and keeps none.
        """
        own = {"fp32": 4, "fp64": 8}.get(str(self.transformer.moe_router_dtype), self.element)
        noisy = self.config.model.router_noise == "training"
        copy = self.transformer.hidden_size * own if noisy and own != self.element else 0
        return copy + own * (3 * experts + 2 * int(self.config.model.router_width or 0))
