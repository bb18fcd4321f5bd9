"""The one router class of ours: Megatron-Core's, and it counts.

Axes: T tokens of this rank's micro-batch (index s * B + b), E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from megatron_dynmix.moe.counter import GateLoadCounter


def in_backward() -> bool:
    """Whether autograd is running: then a forward pass is a recomputation of one already counted.

    `torch.is_grad_enabled` would not do: it is false in the first pass of a recomputed layer and true in
    the second, when the pipeline may already be at another micro-batch.
    """
    return torch._C._current_graph_task_id() != -1


class GateLoadRouter(TopKRouter):
    """`TopKRouter` that tells a `GateLoadCounter` where the tokens of each source go.

    Given through `MoESubmodules.router`. Until a counter is attached it behaves as its parent does.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.counter: GateLoadCounter | None = None
        self.moe_layer_index = -1

    def attach(self, counter: GateLoadCounter, moe_layer_index: int) -> None:
        """Count into `counter`, as its layer `moe_layer_index` (from 0, over the whole model)."""
        self.counter = counter
        self.moe_layer_index = moe_layer_index

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts, and count the choice once per token.

        Args:
            logits: `[S, B, E]`, this rank's slice of the sequence.
            padding_mask: `[S, B]`, True = padding (the parent's docstring has it the wrong way round).

        """
        if padding_mask is not None and padding_mask.shape[0] != logits.shape[0]:
            # Megatron-Core slices the mask for sequence parallelism on the first pipeline stage only.
            rank = parallel_state.get_tensor_model_parallel_rank()
            padding_mask = padding_mask.split(logits.shape[0], dim=0)[rank]
        probs, routing_map_TE = super().routing(logits, padding_mask)
        if self.counter is not None and self.counter.is_recording and not in_backward():
            self.counter.add(self.moe_layer_index, routing_map_TE)
        return probs, routing_map_TE

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Router logits; without Transformer Engine by a plain product.

        The parent's path names a Transformer Engine function that is not defined without it.
        """
        if _without_transformer_engine():
            dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(
                self.config.moe_router_dtype, input.dtype
            )
            bias = None if self.bias is None else self.bias.to(dtype)
            return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)
        return super().gating(input)

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        # The parent lacks the unsqueeze, so a mask [T] meets a map [T, E] and cannot broadcast.
        mask_T1 = None if padding_mask is None else padding_mask.reshape(-1, 1)
        super()._apply_expert_bias(routing_map, padding_mask=mask_T1)


def _without_transformer_engine() -> bool:
    from megatron.core.transformer.moe import moe_utils

    return not moe_utils.HAVE_TE


def attach_counter(
    model_chunks: list[torch.nn.Module], counter: GateLoadCounter, moe_layers: list[int]
) -> None:
    """Attach `counter` to every router of this rank.

    Args:
        counter: what they shall count into.
        model_chunks: the rank's model, one chunk per virtual pipeline stage.
        moe_layers: 0-based decoder layers that are MoE, over the whole model, ascending.

    """
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, GateLoadRouter):
                module.attach(counter, moe_layers.index(module.layer_number - 1))


def router_token_slice(per_token_SB: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """Bring a per-token tensor into the order in which this rank's routers see their tokens.

    Args:
        per_token_SB: `[S, B]`, this context-parallel rank's part of the sequence.
        sequence_parallel: whether the tensor-parallel ranks hold a slice of the sequence each.

    Returns:
        `[T]`, sequence-major.

    """
    if sequence_parallel:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        per_token_SB = per_token_SB.chunk(size, dim=0)[rank]
    return per_token_SB.reshape(-1)
