"""DeepEP's API over gloo, as Megatron-Core uses it: which tokens go where, and what comes back; no kernels.

A rank gets each token once, however many of its experts the token has chosen, and adds up what they make of
it before it sends that back. Axes: T tokens of a rank, G tokens it gets from all ranks, K choices, R ranks,
E experts, H hidden size.
"""

import importlib
import sys

import torch


class EventHandle:
    """What a stream has reached: here, always all."""


class EventOverlap:
    """An event that has happened."""

    def __init__(self, event=None):
        self.event = event

    def current_stream_wait(self):
        """Nothing is under way."""


class Config:
    """How big a buffer has to be: there is none."""

    def get_nvl_buffer_size_hint(self, hidden_bytes, ranks):
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes, ranks):
        return 0


class Buffer:
    """Sends tokens to the ranks of their experts, and sums of what the experts made of them back."""

    sms = None

    def __init__(self, group, num_nvl_bytes, num_rdma_bytes):
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(sms):
        assert sms % 2 == 0, "DeepEP divides them into senders and receivers"
        Buffer.sms = sms

    @staticmethod
    def get_dispatch_config(ranks):
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event, async_finish, allocate_on_comm_stream
    ):
        """Count, of choices [T, K] where -1 is none, tokens by rank and by expert."""
        assert topk_idx.dtype == torch.int64
        assert previous_event is not None or not (async_finish and allocate_on_comm_stream)
        chosen_TE = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.bool).scatter_(
            1, topk_idx + 1, True
        )
        chosen_TE = chosen_TE[:, 1:]
        in_rank_TR = chosen_TE.view(len(topk_idx), self.group.size(), -1).any(dim=2)
        return in_rank_TR.sum(0).int(), None, chosen_TE.sum(0).int(), in_rank_TR, EventOverlap()

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        """Return tokens [G, H], their choice of experts here [G, K] (-1: another rank's), its weights."""
        assert x.dim() == 2 and x.is_contiguous()
        if handle is not None:  # once more to where they went before
            return self._send(x, handle), None, None, None, None, EventOverlap()
        assert topk_weights.dtype == torch.float32
        token_RN = [column.nonzero()[:, 0] for column in is_token_in_rank.T]
        sent = [len(tokens) for tokens in token_RN]
        assert sent == num_tokens_per_rank.tolist()
        got = torch.empty(len(sent), dtype=torch.int64)
        torch.distributed.all_to_all_single(got, torch.tensor(sent), group=self.group)
        handle = (torch.cat(token_RN), sent, got.tolist(), len(x))
        local = len(num_tokens_per_expert) // len(sent)
        expert_GK = self._send(topk_idx, handle) - self.group.rank() * local
        here_GK = (expert_GK >= 0) & (expert_GK < local)
        weight_GK = self._send(topk_weights, handle).masked_fill(~here_GK, 0.0)
        expert_GK = expert_GK.masked_fill(~here_GK, -1)
        counts = [int((expert_GK == expert).sum()) for expert in range(local)]
        return self._send(x, handle), expert_GK, weight_GK, counts, handle, EventOverlap()

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        """Return sums over the ranks that a token went to, of [G, H] and of weights [G, K], if given."""
        assert x.dim() == 2 and x.is_contiguous()
        weights = None if topk_weights is None else self._bring_back(topk_weights, handle)
        return self._bring_back(x, handle), weights, EventOverlap()

    def _send(self, x, handle):
        tokens, sent, got, _ = handle
        out = x.new_empty(sum(got), x.shape[1])
        torch.distributed.all_to_all_single(out, x[tokens], got, sent, group=self.group)
        return out

    def _bring_back(self, x, handle):
        tokens, sent, got, length = handle
        back = x.new_empty(sum(sent), x.shape[1])
        torch.distributed.all_to_all_single(back, x, sent, got, group=self.group)
        return back.new_zeros(length, x.shape[1]).index_add_(0, tokens, back)


def install():
    """Have Megatron-Core, imported already, find this module as the package `deep_ep`, and runs use it."""
    here = sys.modules[__name__]
    sys.modules["deep_ep"] = sys.modules["deep_ep.utils"] = here
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    from megatron_dynmix.training import setup

    importlib.reload(fused_a2a)
    for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms"):
        setattr(token_dispatcher, name, getattr(fused_a2a, name))
    setup.check_host = lambda config, host: None  # which has no CUDA
