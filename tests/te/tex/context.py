"""What Transformer Engine's context parallelism does to joined rows between its parts of attention.

Of each segment a rank has two equal parts, one after the other; `cu_seqlens` are those of the rank. Axes: H
heads, T positions of the rank.
"""

import torch


def _halves(cu_seqlens, length):
    """Masks `[T]` of the first and of the second part of every segment."""
    position, starts = torch.arange(length), cu_seqlens.long()
    assert starts[-1] == length and bool((starts % 2 == 0).all()), "each segment has two equal parts"
    segment = torch.bucketize(position, starts[1:], right=True)
    first = position - starts[segment] < starts.diff()[segment] // 2
    return first, ~first


def thd_read_half_tensor(tensor, cu_seqlens, half_idx):
    return tensor[_halves(cu_seqlens, len(tensor))[half_idx]]


def thd_second_half_lse_correction(lse, lse_per_step, cu_seqlens, lse_packed):
    assert lse_packed
    second = _halves(cu_seqlens, lse.shape[-1])[1]
    lse[:, second] = torch.logaddexp(lse[:, second], lse_per_step)


def thd_read_second_half_lse(lse, cu_seqlens, lse_packed, second_half_lse_seqlen):
    assert lse_packed
    part = lse[:, _halves(cu_seqlens, lse.shape[-1])[1]]
    assert part.shape[-1] == second_half_lse_seqlen
    return part.contiguous()


def thd_out_correction(out, out_per_step, lse, lse_per_step, cu_seqlens, only_second_half, lse_packed):
    assert lse_packed
    where = _halves(cu_seqlens, len(out))[1] if only_second_half else slice(None)
    share_HT = (lse_per_step - lse[:, where]).exp()
    out[where] = (out[where] + out_per_step * share_HT.t()[..., None]).to(out.dtype)


def thd_grad_correction(grad, grad_per_step, cu_seqlens, first_half, second_half):
    halves = _halves(cu_seqlens, len(grad))
    whole = len(grad_per_step) == len(grad)
    for where, how in zip(halves, (first_half, second_half), strict=True):
        if how != "none":
            given = grad_per_step[where] if whole else grad_per_step
            grad[where] = given + grad[where] if how == "add" else given
