"""The router that balances as we mean it, and the counting of what any of Megatron-Core's routers chooses.

Axes: T tokens of this rank's micro-batch (index s * B + b), E experts, G groups of tokens that are balanced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
from megatron.core.transformer.moe.router import TopKRouter

from megatron_dynmix.errors import InputError
from megatron_dynmix.moe.balance import TRACKED, balance_loss_sum, count_choices
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

    def map_TE(self, num_experts: int) -> torch.Tensor:
        """Return the last choice as a routing map."""
        assert self.choice_TK is not None, "no choice was made: the fused router makes none here"
        chosen_TE = self.choice_TK.new_zeros((len(self.choice_TK), num_experts), dtype=torch.bool)
        return chosen_TE.scatter_(1, self.choice_TK, True)


class GateLoadRouter(TopKRouter):
    """`TopKRouter` that balances anew, and whose padding comes from the announced micro-batch where it must.

    Given through `MoESubmodules.router`. Until a counter is attached all real tokens count as trained ones.
    What the coefficients of auxiliary losses mean is in `balance.py`.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.counter: GateLoadCounter | None = None
        self.joined_row_length: int | None = None
        """Positions of a row, where the rows of a micro-batch are joined to one sequence."""
        look_before_dropping(self)
        # The parent counts in float32, which holds no sum of ones past 2^24.
        for name in ("local_tokens_per_expert", "global_tokens_per_expert"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(torch.int64))

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts for logits `[S, B, E]`, this rank's slice of the sequence.

        In `padding_mask` `[S, B]` True is padding (the parent's docstring has it the wrong way round).
        """
        if self.counter is not None:
            padding_mask = self._own_padding(logits, padding_mask)
        return super().routing(logits, padding_mask)

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

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Count the real tokens that chose each expert, also those that were then dropped, for its bias."""
        # Autograd is off in the first pass of a recomputed layer; the second one counts.
        if self.enable_expert_bias and self.training and torch.is_grad_enabled():
            choice_TE = chosen_by(self, routing_map)
            if padding_mask is not None:
                choice_TE = choice_TE & ~padding_mask[:, None]
            self.local_tokens_per_expert += choice_TE.sum(dim=0)

    def _apply_aux_loss(
        self, probs: torch.Tensor, probability_TE: torch.Tensor, chosen_TE: torch.Tensor, **unused: Any
    ) -> torch.Tensor:
        """Balance each micro-batch."""
        return self._balance("aux_loss", probs, probability_TE, chosen_TE, rows=None)

    def _apply_seq_aux_loss(
        self,
        probs: torch.Tensor,
        probability_TE: torch.Tensor,
        chosen_TE: torch.Tensor,
        seq_length: int,
        bsz: int,
        **unused: Any,
    ) -> torch.Tensor:
        """Balance each row."""
        return self._balance("seq_aux_loss", probs, probability_TE, chosen_TE, rows=bsz)

    def _apply_global_aux_loss(
        self, probs: torch.Tensor, probability_TE: torch.Tensor, chosen_TE: torch.Tensor, **unused: Any
    ) -> torch.Tensor:
        """Balance the step as far as it has come."""
        return self._balance("global_aux_loss", probs, probability_TE, chosen_TE, rows=None)

    def _balance(
        self,
        kind: str,
        carrier: torch.Tensor,
        probability_TE: torch.Tensor,
        chosen_TE: torch.Tensor,
        *,
        rows: int | None,
    ) -> torch.Tensor:
        """Return `carrier` with a balance loss; with `rows` that many are balanced apart.

        Probabilities and choices are those of all experts, before any bias or limit, and 0 for padding.
        """
        if not (coefficient := self.get_aux_loss_coeff(kind)):
            return carrier
        probability_TE = probability_TE.float()  # bfloat16, if the router computes in that, can hold no sums
        ranks = self.tp_dp_cp_group if kind == "global_aux_loss" else self.tp_cp_group
        in_group_GT = (
            self._in_row_GT(rows, probability_TE) if rows else probability_TE.new_ones(1, len(chosen_TE))
        )
        count_GE = count_choices(chosen_TE, in_group_GT, ranks)
        tokens = count_GE.sum() / self.topk
        if kind == "global_aux_loss":
            self.global_tokens_per_expert += count_GE[0]
            count_GE = self.global_tokens_per_expert[None]
        loss_sum = balance_loss_sum(probability_TE, count_GE, in_group_GT)
        return self._attach(carrier, TRACKED[kind], coefficient, loss_sum, tokens, ranks)

    def _in_row_GT(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """Return 1 where a token of this rank belongs to a row."""
        tokens = len(like)
        if self.joined_row_length is None:
            return torch.eye(rows, dtype=like.dtype, device=like.device).repeat(1, tokens // rows)
        sharing, rank = (
            (self.tp_group.size(), self.tp_group.rank()) if self.config.sequence_parallel else (1, 0)
        )
        row_G = torch.arange(tokens * sharing // self.joined_row_length, device=like.device)
        row_T = torch.arange(rank * tokens, (rank + 1) * tokens, device=like.device) // self.joined_row_length
        return (row_G[:, None] == row_T).to(like.dtype)

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits `[T, E]` with the z-loss (Zoph et al. 2022, arXiv 2202.08906, equation 5)."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        loss_T = torch.logsumexp(logits.float(), dim=-1).square()
        real_T = torch.ones_like(loss_T) if padding_mask is None else (~padding_mask).float()
        tokens = real_T.sum()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(tokens, group=self.tp_cp_group)
        return self._attach(logits, "z_loss", coefficient, (loss_T * real_T).sum(), tokens, self.tp_cp_group)

    def _attach(
        self,
        carrier: torch.Tensor,
        name: str,
        coefficient: float,
        loss_sum: torch.Tensor,
        tokens: torch.Tensor,
        ranks: torch.distributed.ProcessGroup,
    ) -> torch.Tensor:
        """Return `carrier`, whose backward pass adds the gradient of a loss; track the loss's mean.

        `loss_sum` is over this rank's tokens, `tokens` are those of all `ranks`. Gradients of a step are
        summed and divided by its trained tokens: trained / real makes a mean of a sum over real ones.
        """
        save_to_aux_losses_tracker(
            name,
            loss_sum / tokens.clamp(min=1),
            self.layer_number,
            self.config.num_layers,
            reduce_group=ranks,
            reduce_group_has_dp=ranks is self.tp_dp_cp_group,
        )
        share = 1.0 if self.counter is None else self.counter.trained_share
        return MoEAuxLossAutoScaler.apply(carrier, loss_sum * (coefficient * share))


def replicated(values: torch.Tensor, config: Any) -> torch.nn.Parameter:
    """Return a parameter that every tensor-parallel rank has whole, in the model's precision.

    With sequence parallelism each rank has seen its slice of the sequence only: `finalize_model_grads` is to
    sum the gradients.
    """
    parameter = torch.nn.Parameter(values.to(dtype=config.params_dtype))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


def chosen_by(router: TopKRouter, routing_map_TE: torch.Tensor) -> torch.Tensor:
    """Return what the router chose last, though some of it may have been dropped from the map."""
    if isinstance(router.router_replay, ChoiceBeforeDropping):
        return router.router_replay.map_TE(router.config.num_moe_experts)
    return routing_map_TE


def attach_counter(
    model_chunks: Sequence[torch.nn.Module],
    counter: GateLoadCounter,
    moe_layers: list[int],
    joined_row_length: int | None = None,
    *,
    of_attention: bool = False,
) -> None:
    """Let `counter` count what every router of this rank chooses, each token once; ours or Megatron-Core's.

    `moe_layers` are the decoder's of the whole model, counted from 0. Layers of multi-token prediction route
    tokens that were counted already, and are left out. Routers of attention experts route them to other
    experts: they are counted `of_attention`, those of MLPs otherwise.
    """
    for chunk in model_chunks:
        for name, router in chunk.named_modules():
            parts = name.split(".")
            if not isinstance(router, TopKRouter) or "mtp" in parts:
                continue
            attends = "self_attention" in parts
            if isinstance(router, GateLoadRouter) and not attends:  # it balances, and asks what is padding
                router.counter, router.joined_row_length = counter, joined_row_length
            look_before_dropping(router)
            if attends is not of_attention:
                continue
            # Megatron-Bridge's LoRA takes a router's place and calls parts of it, never its forward; it
            # returns what a router does.
            called = chunk.get_submodule(name.removesuffix(".to_wrap"))
            layer = moe_layers.index(router.layer_number - 1)
            called.register_forward_hook(partial(_count, counter, layer, router))


def look_before_dropping(router: TopKRouter) -> None:
    """Keep the choice of a router that drops tokens over an expert's capacity from its map."""
    if router.config.moe_expert_capacity_factor is None or isinstance(
        router.router_replay, ChoiceBeforeDropping
    ):
        return
    if router.router_replay is not None:
        raise InputError(
            "moe_expert_capacity_factor drops tokens before they are counted, and moe_enable_routing_replay "
            "takes the place where what was chosen before that can be seen; leave one of them out"
        )
    router.router_replay = ChoiceBeforeDropping()


def _count(
    counter: GateLoadCounter,
    layer: int,
    router: TopKRouter,
    called: torch.nn.Module,
    inputs: Any,
    probs_map_TE: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Count what a forward pass of a router, or of what was called for it, has chosen."""
    if counter.is_recording and not in_backward():
        probs_TE, routing_map_TE = probs_map_TE
        counter.add(layer, probs_TE if counter.by_probability else chosen_by(router, routing_map_TE))


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
