"""Stick-breaking attention that keeps no scores: block by block, and once more in the backward pass.

A query breaks a stick of length 1, beginning at its own position and going back: key j gets the share
sigmoid(l_ij) of what the keys between have left, W_ij = sigmoid(l_ij) prod_{j<m<=i} (1 - sigmoid(l_im)), with
logits l = scale * q k. What is left in the end is lost. There is no position embedding: what is near breaks
first.

In logarithms the product is a sum that runs from the query backwards, so keys are laid down in that order and
the sum is a `cumsum`. With g = W dW, where dW is the gradient of the weights, that of the logits is
dl_ij = g_ij - sigmoid(l_ij) sum_{m<=j} g_im: a weight falls with every logit that comes before it.

Axes: B rows, G heads of keys, R queries that share one, Q positions that attend, C those of one block,
S positions that may be attended to, M those that a block needs, D width of a head.
Source: Shen et al. 2023 (arXiv 2306.04640), section 3.2; the gradient is derived from it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, pad

BLOCK_SCORES = 1 << 20
"""Scores that are computed at a time; some five arrays of them, in float32, are alive at once."""


class Block(NamedTuple):
    """Queries of one row, and the run of keys that they need between them."""

    row: int
    begin: int
    end: int
    low: int
    high: int


def stick_breaking_attention(
    query_BGQRD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    first_BQ: torch.Tensor,
    own_Q: torch.Tensor,
    *,
    scale: float | None = None,
    block_scores: int = BLOCK_SCORES,
) -> torch.Tensor:
    """Return `[B, G, Q, R, D]`; each query attends from its own position `own_Q` back to `first_BQ`.

    Keys and values are in the order of their positions. `scale` is 1 / sqrt(D) if not given. Logits have the
    type of the queries, weights and their sums are float32, or float64 where the queries are.
    """
    scale = scale or 1 / math.sqrt(query_BGQRD.shape[-1])
    blocks = _blocks(query_BGQRD.shape, first_BQ, own_Q, key_BGSD.shape[2], block_scores)
    return _StickBreaking.apply(query_BGQRD, key_BGSD, value_BGSD, first_BQ, own_Q, scale, blocks)


def _blocks(
    shape: torch.Size, first_BQ: torch.Tensor, own_Q: torch.Tensor, keys: int, scores: int
) -> list[Block]:
    """Cut each row's queries into blocks of one length; this waits for the device, once."""
    _, heads, queries, sharing, _ = shape
    length = min(queries, max(1, scores // (heads * sharing * keys)))
    count = -(-queries // length)
    rest = (0, count * length - queries)
    low_BN = pad(first_BQ, rest, value=keys).unflatten(-1, (count, length)).amin(-1)
    high_N = pad(own_Q, rest, value=-1).unflatten(-1, (count, length)).amax(-1)
    *lows_BN, highs_N = torch.cat([low_BN, high_N[None]]).tolist()
    return [
        Block(row, number * length, min(queries, (number + 1) * length), low, high + 1)
        for row, lows_N in enumerate(lows_BN)
        for number, (low, high) in enumerate(zip(lows_N, highs_N, strict=True))
    ]


class _StickBreaking(torch.autograd.Function):
    """Keeps what it is given, and computes the weights of a block where they are needed."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        first_BQ: torch.Tensor,
        own_Q: torch.Tensor,
        scale: float,
        blocks: list[Block],
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, first_BQ, own_Q)
        ctx.scale, ctx.blocks = scale, blocks
        key, value = key.flip(2), value.flip(2)
        context = query.new_empty(*query.shape[:-1], value.shape[-1])
        for block in blocks:
            keys = _backwards(block, key.shape[2])
            query_GCRD = query[block.row, :, block.begin : block.end]
            weight_GCRM, _ = _weights(query_GCRD, key[block.row, :, keys], first_BQ, own_Q, scale, block)
            mixed_GCRD = _times(weight_GCRM.to(value.dtype), value[block.row, :, keys])
            context[block.row, :, block.begin : block.end] = mixed_GCRD
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_context: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, first_BQ, own_Q = ctx.saved_tensors
        key, value = key.flip(2), value.flip(2)
        wide = torch.promote_types(key.dtype, torch.float32)
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for block in ctx.blocks:
            row, keys = block.row, _backwards(block, key.shape[2])
            query_GCRD = query[row, :, block.begin : block.end]
            d_context_GCRD = d_context[row, :, block.begin : block.end]
            key_GMD, value_GMD = key[row, :, keys], value[row, :, keys]
            weight, share = _weights(query_GCRD, key_GMD, first_BQ, own_Q, ctx.scale, block)
            d_value[row, :, keys] += _summed(weight.to(value.dtype), d_context_GCRD)
            moved = _times(d_context_GCRD, value_GMD.transpose(1, 2)).to(wide).mul_(weight)
            del weight
            # of this key and those further back, which keys at this end of the axis come after
            behind = moved.sum(-1, keepdim=True).sub(moved.cumsum(-1)).add_(moved)
            d_logit = moved.sub_(share.mul_(behind)).mul_(ctx.scale).to(query.dtype)
            d_query[row, :, block.begin : block.end] = _times(d_logit, key_GMD)
            d_key[row, :, keys] += _summed(d_logit, query_GCRD)
        return d_query, d_key.to(key.dtype).flip(2), d_value.to(value.dtype).flip(2), None, None, None, None


def _backwards(block: Block, keys: int) -> slice:
    """Return where a block's keys are once all of them are laid down from the last to the first."""
    return slice(keys - block.high, keys - block.low)


def _weights(
    query_GCRD: torch.Tensor,
    key_GMD: torch.Tensor,
    first_BQ: torch.Tensor,
    own_Q: torch.Tensor,
    scale: float,
    block: Block,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[G, C, R, M]`: weights, and shares of what is left; keys from the last to the first."""
    logit = _times(query_GCRD, key_GMD.transpose(1, 2))
    logit = logit.to(torch.promote_types(logit.dtype, torch.float32)).mul_(scale)
    key_M = torch.arange(block.high - 1, block.low - 1, -1, device=logit.device)
    own_C, first_C = own_Q[block.begin : block.end], first_BQ[block.row, block.begin : block.end]
    hidden_CM = (key_M < first_C[:, None]) | (key_M > own_C[:, None])
    logit.masked_fill_(hidden_CM[:, None], -math.inf)  # takes nothing, and lets everything pass
    log_pass = logsigmoid(-logit)
    share = logit.add_(log_pass).exp_()
    weight = log_pass.cumsum(-1).sub_(log_pass).exp_().mul_(share)
    return weight, share


def _times(left_GCRX: torch.Tensor, right_GXY: torch.Tensor) -> torch.Tensor:
    """Return `[G, C, R, Y]`."""
    return (left_GCRX.flatten(1, 2) @ right_GXY).unflatten(1, left_GCRX.shape[1:3])


def _summed(left_GCRM: torch.Tensor, right_GCRY: torch.Tensor) -> torch.Tensor:
    """Return `[G, M, Y]`: products summed over the queries C and R."""
    return left_GCRM.flatten(1, 2).transpose(1, 2) @ right_GCRY.flatten(1, 2)
