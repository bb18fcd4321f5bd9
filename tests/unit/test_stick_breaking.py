"""Stick-breaking attention in blocks is that of its formula, one key at a time.

Axes: B rows, G heads of keys, R queries that share one, Q positions that attend, S positions, D head width.
"""

import math

import pytest
import torch

from megatron_dynmix.model.stick_breaking import stick_breaking_attention


def plain(query, key, value, first_BQ, own_Q, scale=None):
    """By the formula: the share of each key, times what the keys between it and the query have left."""
    scale = scale or 1 / math.sqrt(query.shape[-1])
    share_BGQRS = torch.sigmoid(scale * torch.einsum("bgqrd,bgsd->bgqrs", query, key))
    position_S = torch.arange(key.shape[2])
    seen_BQS = (position_S >= first_BQ[..., None]) & (position_S <= own_Q[:, None])
    share_BGQRS = share_BGQRS * seen_BQS[:, None, :, None]
    left = [(1 - share_BGQRS[..., position + 1 :]).prod(-1) for position in position_S]
    return torch.einsum("bgqrs,bgsd->bgqrd", share_BGQRS * torch.stack(left, -1), value)


def inputs(shape, own_Q, segments, dtype=torch.float64, seed=3):
    """Queries, keys, values and first keys; one position in six begins a segment."""
    rows, heads, keys, sharing, width = shape
    torch.manual_seed(seed)
    query = torch.randn(rows, heads, len(own_Q), sharing, width, dtype=torch.float64) * 2
    key, value = torch.randn(2, rows, heads, keys, width, dtype=torch.float64)
    begins_BS = torch.rand(rows, keys) < (1 / 6 if segments else 0)
    first_BS = torch.where(begins_BS, torch.arange(keys), 0).cummax(-1).values
    tensors = (tensor.to(dtype).requires_grad_() for tensor in (query, key, value))
    return (*tensors, first_BS[:, own_Q], own_Q)


ALL = torch.arange(13)
CASES = {
    "one head": ((1, 1, 13, 4, 8), ALL, False),
    "segments": ((3, 1, 13, 2, 5), ALL, True),
    "several heads": ((2, 3, 13, 2, 7), ALL, True),
    "one position": ((2, 1, 1, 3, 4), ALL[:1], True),
    "a slice of the queries": ((2, 1, 13, 2, 5), ALL[5:11], True),
    "two parts of them": ((2, 1, 12, 2, 5), torch.cat([ALL[3:6], ALL[9:12]]), True),
}


@pytest.mark.parametrize("block_scores", [1, 40, 10_000])
@pytest.mark.parametrize("name", CASES)
def test_context_and_gradients_are_those_of_the_formula(name, block_scores):
    given = inputs(*CASES[name])
    found, wanted = stick_breaking_attention(*given, block_scores=block_scores), plain(*given)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(wanted)
    mine, its = (torch.autograd.grad(context, given[:3], weight) for context in (found, wanted))
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    query, key, value, first_BQ, own_Q = inputs((2, 1, 5, 2, 3), torch.arange(5), segments=True)

    def attend(*tensors):
        return stick_breaking_attention(*tensors, first_BQ, own_Q, scale=0.7, block_scores=50)

    assert torch.autograd.gradcheck(attend, (query, key, value), fast_mode=True)


def test_logits_that_leave_nothing_or_everything_are_finite():
    query, key, value, first_BQ, own_Q = inputs((1, 1, 13, 2, 4), ALL, segments=False, dtype=torch.float32)
    for scale in (1e4, -1e4):
        context = stick_breaking_attention(query, key, value, first_BQ, own_Q, scale=scale)
        gradients = torch.autograd.grad(context.sum(), (query, key, value))
        assert all(tensor.isfinite().all() for tensor in (context, *gradients))


def test_bfloat16_is_as_near_as_its_rounding():
    given = inputs((2, 1, 13, 2, 16), ALL, segments=True, dtype=torch.bfloat16)
    exact = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in given)
    found, wanted = stick_breaking_attention(*given, block_scores=60), plain(*exact)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0.03)
    mine, its = (torch.autograd.grad(context.double().sum(), given[:3]) for context in (found, wanted))
    torch.testing.assert_close(mine, its, rtol=0.05, atol=0.1)


def test_no_scores_are_kept_for_the_backward_pass():
    given = inputs((2, 1, 64, 4, 8), torch.arange(64), segments=True)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stick_breaking_attention(*given)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in given}


def test_blocks_read_no_key_of_segments_before_theirs():
    query, key, value, _, own_Q = inputs((1, 1, 64, 1, 8), torch.arange(64), segments=False)
    first_BQ = (own_Q // 16 * 16)[None]
    key, value = (torch.where(own_Q[:, None] < 32, torch.nan, tensor) for tensor in (key, value))
    context = stick_breaking_attention(query, key, value, first_BQ, own_Q, block_scores=16 * 64)
    assert context[0, 0, 32:].isfinite().all() and context[0, 0, :32].isnan().all()
