"""Attention whose projections of queries and outputs are a mixture of experts, as ModuleFormer (MoLM) has it.

A router sends each token to K of E experts. It attends K times, once with the query of each; the outputs are
added up, weighted by the router. Keys and values are the same for all experts: what enters the layer.

Every rank has all experts, as it has all of any attention: a fifth of a MoLM's parameters. As a MoLM has one
head of keys, tensor-parallel ranks cannot divide heads: each attends with the queries of its slice of the
sequence and gathers the keys, as context-parallel ranks do.

Axes: Q positions on this rank, S of whole rows, B rows, H hidden size, T = Q * B tokens, E experts, K chosen
ones, P = T * K pairs of a token and an expert, G heads of keys, D width of a head.
Source: Shen et al. 2023 (arXiv 2306.04640), section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmix import platform
from megatron_dynmix.model.positions import context_parallel_positions
from megatron_dynmix.model.stick_breaking import stick_breaking_attention
from megatron_dynmix.moe.router import GateLoadRouter, replicated


class ExpertAttention(MegatronModule):
    """Takes the place of `SelfAttention` in the spec of a layer.

    Experts have `num_query_groups` heads of width `kv_channels`; a token attends with `num_attention_heads` /
    `num_query_groups` experts. Parameters: `query_weight` `[E, H, G * D]`, `output_weight` `[E, G * D, H]`,
    and those of the router.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        experts: int,
        router: Callable[..., GateLoadRouter],
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.num_query_groups and config.kv_channels, "Megatron-Core fills them in"
        self.heads, self.width = config.num_query_groups, config.kv_channels
        chosen = config.num_attention_heads // self.heads
        self.router = router(
            config=_router_config(config, experts, chosen), pg_collection=get_default_pg_collection()
        )
        self.router.set_layer_number(layer_number)
        inner = self.heads * self.width
        self.query_weight = self._parameter((experts, config.hidden_size, inner), config.init_method)
        self.output_weight = self._parameter(
            (experts, inner, config.hidden_size), config.output_layer_init_method
        )

    def _parameter(
        self, shape: tuple[int, ...], initialize: Callable[[torch.Tensor], Any]
    ) -> torch.nn.Parameter:
        values = torch.empty(shape)
        if self.config.perform_initialization:
            initialize(values)
        return replicated(values, self.config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **unused: Any
    ) -> tuple[torch.Tensor, None]:
        """Return `[Q, B, H]`, and that no bias is to be added.

        `hidden_states` are `[Q, B, H]`; the mask `[B, 1, Q, S]`, with Q all positions of a context-parallel
        rank, is True where a query may not attend. Without one, attention is causal over the whole row.
        """
        pairs = Pairs(*self.router(hidden_states), chosen=self.router.topk)
        inputs_PH = pairs.of_tokens(hidden_states.flatten(0, 1))
        query = pairs.by_token(_times_own_matrix(inputs_PH, self.query_weight, pairs.counts))
        query_QBKGD = query.view(*hidden_states.shape[:2], pairs.chosen, self.heads, self.width)
        context_QBKGD = self.attend(query_QBKGD, *self.keys_and_values(hidden_states), attention_mask)
        context = pairs.by_expert(context_QBKGD.reshape(len(inputs_PH), -1))
        outputs_PH = _times_own_matrix(context, self.output_weight, pairs.counts)
        return pairs.weighted_sum(outputs_PH).view_as(hidden_states), None

    def keys_and_values(self, hidden_QBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `[S, B, G, D]` each, of whole rows: what enters the layer is both."""
        both_SBGD = self.whole_rows(hidden_QBH.unflatten(-1, (self.heads, self.width)))
        return both_SBGD, both_SBGD

    def attend(
        self,
        query_QBKGD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `[Q, B, K, G, D]`: what each query gathers, from itself back through its segment."""
        own_C = self._positions(key_SBGD.shape[0], key_SBGD.device)
        if attention_mask is None:
            first_BC = torch.zeros_like(own_C)[None].expand(key_SBGD.shape[1], -1)
        else:  # a query may attend to its segment as far as itself: so many keys tell where that begins
            first_BC = own_C + 1 - (~attention_mask[:, 0]).sum(-1)
        context_BGQKD = stick_breaking_attention(
            query_QBKGD.permute(1, 3, 0, 2, 4),
            key_SBGD.permute(1, 2, 0, 3),
            value_SBGD.permute(1, 2, 0, 3),
            self._own_slice(first_BC),
            self._own_slice(own_C),
            scale=self.config.softmax_scale,
        )
        return context_BGQKD.permute(2, 0, 3, 1, 4)

    def _positions(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the positions in its rows that this context-parallel rank holds."""
        ranks = self.config.context_parallel_size
        return context_parallel_positions(length, ranks, device)[parallel_state.get_context_parallel_rank()]

    def _own_slice(self, of_positions: torch.Tensor) -> torch.Tensor:
        """Return this tensor-parallel rank's slice of the last axis."""
        if not self.config.sequence_parallel:
            return of_positions
        ranks, rank = self.config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
        return of_positions.chunk(ranks, dim=-1)[rank]

    def whole_rows(self, part_QBGD: torch.Tensor) -> torch.Tensor:
        """Gather `[S, B, G, D]` in the order of the positions."""
        if self.config.sequence_parallel:
            part_QBGD = gather_from_sequence_parallel_region(part_QBGD)
        if (ranks := self.config.context_parallel_size) == 1:
            return part_QBGD
        group = parallel_state.get_context_parallel_group()
        whole_SBGD = gather_from_sequence_parallel_region(part_QBGD.contiguous(), group=group)
        held_RC = context_parallel_positions(len(whole_SBGD), ranks, whole_SBGD.device)
        return whole_SBGD[held_RC.flatten().argsort()]


class Pairs:
    """Pairs of a token and an expert chosen for it, by expert or by token.

    There are as many as the shapes say, so nothing but the experts' numbers of them waits for the device.
    """

    def __init__(self, weight_TE: torch.Tensor, chosen_TE: torch.Tensor, *, chosen: int) -> None:
        self.chosen, tokens = chosen, len(chosen_TE)
        self.counts = platform.rows_of_experts(chosen_TE.sum(0), tokens * chosen)
        """Pairs of each expert."""
        chosen_first = (~chosen_TE.t().flatten()).byte().argsort(stable=True)[: tokens * chosen]
        expert_P, self._token_P = chosen_first // tokens, chosen_first % tokens
        rank_P = (chosen_TE.cumsum(1) - 1)[self._token_P, expert_P]
        self._place_P = self._token_P * chosen + rank_P
        """Of each pair in the order of the experts, its place in that of the tokens."""
        self._pair_P = self._place_P.argsort()
        self._weight_P = weight_TE[self._token_P, expert_P]

    def of_tokens(self, rows_TX: torch.Tensor) -> torch.Tensor:
        """Return the row of each pair's token, by expert."""
        return rows_TX[self._token_P]

    def by_expert(self, rows_PX: torch.Tensor) -> torch.Tensor:
        """Bring rows that are sorted by token into the order of the experts."""
        return rows_PX[self._place_P]

    def by_token(self, rows_PX: torch.Tensor) -> torch.Tensor:
        """Bring rows that are sorted by expert into the order of the tokens."""
        return rows_PX[self._pair_P]  # not `index_copy`, which would keep the rows for its backward pass

    def weighted_sum(self, rows_PX: torch.Tensor) -> torch.Tensor:
        """Return `[T, X]`: a token's rows, given by expert, times their weights, added up."""
        weighted_PX = self.by_token(rows_PX * self._weight_P[:, None])
        return weighted_PX.unflatten(0, (-1, self.chosen)).sum(1).to(rows_PX.dtype)


def _times_own_matrix(rows_PI: torch.Tensor, weight_EIO: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Multiply the rows of each expert, which follow one another, by its matrix."""
    parts = zip(rows_PI.split(counts), weight_EIO.unbind(), strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])


def _router_config(config: TransformerConfig, experts: int, chosen: int) -> TransformerConfig:
    """Return what the router of attention experts is told; what balances or limits is for those of MLPs."""
    own = copy.copy(config)
    own.num_moe_experts, own.moe_router_topk = experts, chosen
    own.moe_router_load_balancing_type, own.moe_z_loss_coeff = "none", None
    own.moe_expert_capacity_factor, own.moe_router_enable_expert_bias = None, False
    own.moe_router_num_groups, own.moe_router_group_topk = None, None
    own.moe_router_topk_scaling_factor = None
    return own
