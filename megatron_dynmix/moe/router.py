"""The router: Megatron-Core's, and it counts.

Axes: T tokens of this rank's micro-batch (index s * B + b), E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from megatron_dynmix.moe.counter import GateLoadCounter


def in_backward() -> bool:
    """Tell whether autograd is running: then a forward pass is a recomputation of one already counted.

    `torch.is_grad_enabled` would not do: it is false in the first pass of a recomputed layer and true in
    the second, when the pipeline may already be at another micro-batch.
    """
    return torch._C._current_graph_task_id() != -1


class ChoiceBeforeDropping:
    """Keeps which experts a forward pass chose, before tokens over an expert's capacity are dropped.

    Takes the place of Megatron-Core's `RouterReplay`, which is asked for every choice; it only looks on.
    """

    def __init__(self) -> None:
        self.choice_TK: torch.Tensor | None = None

    def get_replay_topk(
        self,
        scores_TE: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        choose: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and experts as `choose` has them."""
        scores_TK, self.choice_TK = choose(scores_TE, topk, num_groups=num_groups, group_topk=group_topk)
        return scores_TK, self.choice_TK

    def take_map_TE(self, num_experts: int) -> torch.Tensor:
        """Return the last choice as a routing map."""
        assert self.choice_TK is not None, "no choice was made: the fused router makes none here"
        choice_TK, self.choice_TK = self.choice_TK, None
        chosen_TE = torch.zeros(len(choice_TK), num_experts, dtype=torch.bool, device=choice_TK.device)
        return chosen_TE.scatter_(1, choice_TK, True)


class GateLoadRouter(TopKRouter):
    """`TopKRouter` that tells a `GateLoadCounter` where the tokens of each source go.

    Given through `MoESubmodules.router`. Until a counter is attached it behaves as its parent does.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        if config.moe_z_loss_coeff is not None:
            # The parent divides it by the ranks that share a sequence, as for a mean of their losses; a
            # per-token loss is their sum.
            config = copy.copy(config)
            config.moe_z_loss_coeff *= parallel_state.get_tensor_model_parallel_world_size()
            config.moe_z_loss_coeff *= parallel_state.get_context_parallel_world_size()
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.counter: GateLoadCounter | None = None
        self.moe_layer_index = -1
        if config.moe_expert_capacity_factor is not None:
            self.router_replay = ChoiceBeforeDropping()

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts for logits `[S, B, E]`, this rank's slice of the sequence; count each token once.

        In `padding_mask` `[S, B]` True is padding (the parent's docstring has it the wrong way round).
        """
        if self.counter is not None:
            padding_mask = self._own_padding(logits, padding_mask)
        probs, routing_map_TE = super().routing(logits, padding_mask)
        if self.counter is not None and self.counter.is_recording and not in_backward():
            mass_TE = probs if self.counter.by_probability else self._choice_TE(routing_map_TE)
            self.counter.add(self.moe_layer_index, mass_TE)
        return probs, routing_map_TE

    def _own_padding(self, logits: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Return the padding mask of the tokens of `logits`, also where Megatron-Core brings another."""
        if padding_mask is None:
            # Recomputation `block` gives no mask to the layers that it does not recompute. Those run once,
            # when the announced micro-batch is theirs.
            assert self.counter is not None and not in_backward()
            return self.counter.padding_T.view(logits.shape[:2])
        if padding_mask.shape[0] != logits.shape[0]:
            # The mask is sliced for sequence parallelism on the first pipeline stage only.
            rank = parallel_state.get_tensor_model_parallel_rank()
            return padding_mask.split(logits.shape[0], dim=0)[rank]
        return padding_mask

    def _choice_TE(self, routing_map_TE: torch.Tensor) -> torch.Tensor:
        """Return what was chosen, though some of it may have been dropped from the map."""
        if isinstance(self.router_replay, ChoiceBeforeDropping):
            return self.router_replay.take_map_TE(self.config.num_moe_experts)
        return routing_map_TE

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return router logits, without Transformer Engine by a plain product."""
        if not moe_utils.HAVE_TE:  # the parent names a function of it that is undefined then
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


def attach_counter(
    model_chunks: list[torch.nn.Module], counter: GateLoadCounter, moe_layers: list[int]
) -> None:
    """Attach `counter` to every router of this rank; `moe_layers` are the whole model's, counted from 0."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, GateLoadRouter):
                module.counter = counter
                module.moe_layer_index = moe_layers.index(module.layer_number - 1)


def router_token_slice(per_token_SB: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """Bring a per-token tensor into the order `[T]`, sequence-major, in which this rank's routers see it.

    `per_token_SB` is this context-parallel rank's part of the sequence; with sequence parallelism each
    tensor-parallel rank holds a slice of that.
    """
    if sequence_parallel:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        per_token_SB = per_token_SB.chunk(size, dim=0)[rank]
    return per_token_SB.reshape(-1)
