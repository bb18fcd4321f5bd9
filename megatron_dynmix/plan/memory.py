"""Memory of each rank, by pipeline stage: what the theoretical memory report of Megatron-LM sums, for MoE.

Model states are those of Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054, section 3.1) for Adam in mixed
precision, with gradients summed in float32 as here: 2 bytes of parameters, 4 of gradients and 12 of
optimizer (master weights, both moments), 18 a parameter; the distributed optimizer (ZeRO stage 1) divides
the 12 by the replicas. In float32 there are no master weights: 4 + 4 + 8. Experts are divided over EP x ETP
ranks and have replicas of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.host import Host
from megatron_dynmix.config.megatron import ddp_config, params_dtype
from megatron_dynmix.plan.activations import Activations, stage_activations
from megatron_dynmix.plan.layout import Layout, micro_batches
from megatron_dynmix.plan.parameters import Parameters, stage_layers, stage_parameters, transformer_here

FP32 = 4
MASTER, MOMENTS = 4, 8
"""Bytes of the optimizer for each parameter, unless it is told other types."""
PRECISION_AWARE = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
OVERHEAD_BYTES = 2 * 2**30
"""Of a GPU that no formula has: the CUDA context, NCCL's buffers, workspaces of the libraries."""
FRAGMENTATION = 1.05
"""Of what the allocator holds to what is in use, with room for rows of experts that get more than others."""


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
        """What the formulas give."""
        return self.weights + self.gradients + self.optimizer + self.activations.total

    @property
    def needed(self) -> int:
        """What a GPU should have: the total, fragmentation and what the libraries hold."""
        return int(self.total * FRAGMENTATION) + OVERHEAD_BYTES


def memory_by_stage(config: RunConfig, layout: Layout, host: Host) -> list[StageMemory]:
    """Memory of a rank of each pipeline stage, for a configuration that was checked.

    Args:
        config: the resolved configuration.
        layout: of the ranks.
        host: what they have.

    Raises:
        InputError: a model whose parameters are not known before it is built.

    """
    transformer = transformer_here(config)
    return [_stage_memory(config, transformer, layout, host, stage) for stage in range(layout.pp)]


def _stage_memory(
    config: RunConfig, transformer: TransformerConfig, layout: Layout, host: Host, stage: int
) -> StageMemory:
    parameters = stage_parameters(config, transformer, stage)
    weights, gradients = params_dtype(config).itemsize, FP32
    if not ddp_config(config).grad_reduce_in_fp32:
        gradients = weights
    return StageMemory(
        stage=stage,
        layers=_layers_of(transformer, stage),
        parameters=parameters,
        weights=weights * parameters.total,
        gradients=gradients * parameters.total,
        optimizer=_optimizer_bytes(config, layout, parameters),
        activations=stage_activations(
            *(config, transformer, layout, host), stage=stage, micro_batches=micro_batches(config, layout)
        ),
    )


def _layers_of(transformer: TransformerConfig, stage: int) -> int:
    return sum(map(len, stage_layers(transformer, stage)))


def _optimizer_bytes(config: RunConfig, layout: Layout, parameters: Parameters) -> int:
    """Of one rank; the distributed optimizer shards over data- and context-parallel ranks."""
    each, replicas = bytes_per_parameter(config), layout.dp * layout.cp
    if not config.parallel.use_distributed_optimizer:
        return each * parameters.total
    # Without expert parallelism Megatron-Core keeps experts in the same buffers as everything else.
    of_experts = layout.expert_dp if layout.ep > 1 else replicas
    return -(-each * parameters.dense // replicas) + -(-each * parameters.expert // of_experts)


def bytes_per_parameter(config: RunConfig) -> int:
    """Bytes of optimizer state for a parameter that is not sharded."""
    if config.optimizer.megatron.get("use_precision_aware_optimizer"):
        given = {**{name: torch.float32 for name in PRECISION_AWARE}, **config.optimizer.megatron}
        kinds = [str(given[name]).removeprefix("torch.") for name in PRECISION_AWARE]
        return sum(getattr(torch, kind).itemsize for kind in kinds)
    return MOMENTS + (MASTER if config.training.bf16 else 0)


def checkpoint_bytes(config: RunConfig, parameters: int) -> int:
    """Size of a checkpoint: weights and optimizer state of every parameter, once."""
    return parameters * (params_dtype(config).itemsize + bytes_per_parameter(config))
