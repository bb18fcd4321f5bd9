"""Attention as cuDNN's fused kernels are told of it: rows, or segments of joined rows.

Axes: H query heads, Q queries and K keys of a segment, D head width.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tests.te.tex.names import (
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)


def get_fused_attn_backend(*shape):
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


@dataclass(frozen=True)
class _Call:
    """What is the same for all segments of a call."""

    formats: tuple[str, str]
    """Of queries and of keys: sbhd, bshd, thd."""
    scale: float
    dropout: float
    mask: str
    softmax: NVTE_Softmax_Type
    window: tuple[int, int]
    cu: tuple[Any, Any]
    cu_padded: tuple[Any, Any]
    offset_H: torch.Tensor | None
    """What learnable softmax adds to the denominator."""

    @classmethod
    def of(cls, layout, bias_type, mask, softmax, scale, dropout, window, cu, cu_padded, longest, offset):
        assert bias_type == NVTE_Bias_Type.NVTE_NO_BIAS
        parts = NVTE_QKV_Layout(layout).name.removeprefix("NVTE_").replace("3", "").replace("2", "").lower()
        formats = parts.split("_")
        for bounds, most, form in zip(cu, longest, (formats[0], formats[-1]), strict=True):
            if form == "thd":
                assert bounds.dtype == torch.int32, f"cu_seqlens are {bounds.dtype}"
                length = bounds.diff()
                assert bounds[0] == 0 and bool((length >= 0).all()), "cu_seqlens go up from 0"
                assert int(length.max()) <= most, f"max_seqlen is {most}, a segment has {int(length.max())}"
        return cls(
            formats=(formats[0], formats[-1]),
            scale=scale,
            dropout=dropout,
            mask=NVTE_Mask_Type(mask).name.removeprefix("NVTE_").lower(),
            softmax=NVTE_Softmax_Type(softmax),
            window=tuple(window),
            cu=cu,
            cu_padded=cu_padded,
            offset_H=None if offset is None else offset.flatten().float(),
        )

    def segments(self, side, tensor):
        """Views `[positions, heads, width]` of a tensor, one a segment; `side` 0 queries, 1 keys."""
        form, cu = self.formats[side], self.cu[side]
        if form != "thd":
            rows = tensor.unbind(1 if form == "sbhd" else 0)
            lengths = cu.diff().tolist() if "padding" in self.mask else [rows[0].shape[0]] * len(rows)
            return [row[:length] for row, length in zip(rows, lengths, strict=True)]
        begins = (cu if self.cu_padded[side] is None else self.cu_padded[side]).tolist()
        assert begins[-1] <= tensor.shape[0], f"cu_seqlens end at {begins[-1]} of {tensor.shape[0]} tokens"
        return [
            tensor[begin : begin + length]
            for begin, length in zip(begins[:-1], cu.diff().tolist(), strict=True)
        ]

    def logits_HQK(self, q, k):
        group = q.shape[1] // k.shape[1]
        logits = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, dim=1))
        row = torch.arange(q.shape[0])[:, None]
        if "bottom_right" in self.mask:
            row = row + k.shape[0] - q.shape[0]
        column = torch.arange(k.shape[0])
        left, right = self.window
        hidden = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
        if "causal" in self.mask:
            hidden |= column > row
        if left >= 0:
            hidden |= column < row - left
        if right >= 0:
            hidden |= column > row + right
        return (logits * self.scale).masked_fill(hidden, float("-inf"))

    def lse_HQ(self, logits_HQK):
        lse = logits_HQK.logsumexp(dim=-1)
        if self.softmax == NVTE_Softmax_Type.NVTE_OFF_BY_ONE_SOFTMAX:
            return torch.logaddexp(lse, torch.zeros(()))
        if self.softmax == NVTE_Softmax_Type.NVTE_LEARNABLE_SOFTMAX:
            return torch.logaddexp(lse, self.offset_H[:, None])
        return lse

    def kept_HQK(self, like, generator):
        """What dropout keeps, divided by its share."""
        if not self.dropout:
            return torch.ones(())
        return (torch.rand(like.shape, generator=generator) >= self.dropout) / (1.0 - self.dropout)


def _generator(seed):
    return torch.Generator().manual_seed(int(seed))


def fused_attn_fwd(
    max_seqlen_q,
    max_seqlen_kv,
    is_training,
    attn_scale,
    p_dropout,
    set_zero,
    qkv_layout,
    bias_type,
    attn_mask_type,
    softmax_type,
    window_size,
    cu_seqlens_q,
    cu_seqlens_kv,
    Q,
    K,
    V,
    fake_dtype,
    cu_seqlens_q_padded,
    cu_seqlens_kv_padded,
    page_table_k,
    page_table_v,
    s_quantizer,
    o_quantizer,
    Bias,
    SoftmaxOffset,
    rng_gen,
    rng_elts_per_thread,
    return_max_logit,
    cuda_graph=False,
):
    assert s_quantizer is None and o_quantizer is None and page_table_k is None
    call = _Call.of(
        *(qkv_layout, bias_type, attn_mask_type, softmax_type, attn_scale),
        *(p_dropout if is_training else 0.0, window_size, (cu_seqlens_q, cu_seqlens_kv)),
        *((cu_seqlens_q_padded, cu_seqlens_kv_padded), (max_seqlen_q, max_seqlen_kv), SoftmaxOffset),
    )
    seed = torch.randint(2**62, (2,)) if call.dropout else torch.zeros(2, dtype=torch.int64)
    generator = _generator(seed[0])
    output = Q.new_zeros((*Q.shape[:-1], V.shape[-1]))
    if call.formats[0] == "thd":
        largest, lse = (torch.full((Q.shape[0], Q.shape[1], 1), fill) for fill in (float("-inf"), 0.0))
    else:
        rows, length = Q.shape[:2] if call.formats[0] == "bshd" else (Q.shape[1], Q.shape[0])
        largest, lse = (torch.full((rows, Q.shape[2], length, 1), fill) for fill in (float("-inf"), 0.0))
    parts = zip(
        *(call.segments(side, tensor) for side, tensor in ((0, Q), (1, K), (1, V), (0, output))),
        *(_stats(call, tensor, Q) for tensor in (largest, lse)),
        strict=True,
    )
    for q, k, v, o, top_HQ, lse_HQ in parts:
        if not len(q):
            continue
        logits = call.logits_HQK(q, k)
        top_HQ.copy_(logits.amax(dim=-1))
        lse_HQ.copy_(call.lse_HQ(logits))
        weights = (logits - lse_HQ[..., None]).exp() * call.kept_HQK(logits, generator)
        o.copy_(torch.einsum("hqk,khd->qhd", weights, _spread(v, q)))
    if return_max_logit:
        return [output, largest, (lse - largest).exp(), seed]
    return [output, lse, seed]


def _stats(call, tensor, Q):
    """Views `[H, Q]` of what is kept of each query, one a segment."""
    if call.formats[0] == "thd":
        return [part.squeeze(-1).t() for part in call.segments(0, tensor)]
    lengths = [len(part) for part in call.segments(0, Q)]
    return [row[:, :length, 0] for row, length in zip(tensor, lengths, strict=True)]


def _spread(v, q):
    return v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def fused_attn_bwd(
    max_seqlen_q,
    max_seqlen_kv,
    attn_scale,
    p_dropout,
    set_zero,
    qkv_layout,
    bias_type,
    attn_mask_type,
    softmax_type,
    window_size,
    deterministic,
    cu_seqlens_q,
    cu_seqlens_kv,
    Q,
    K,
    V,
    O,  # noqa: E741
    dO,
    fake_dtype,
    dqkv_type,
    aux,
    cu_seqlens_q_padded,
    cu_seqlens_kv_padded,
    s_quantizer,
    dp_quantizer,
    dqkv_quantizer,
    cuda_graph=False,
):
    """From the statistics that were kept, which under context parallelism are those of all keys."""
    lse, seed, *offset = aux
    call = _Call.of(
        *(qkv_layout, bias_type, attn_mask_type, softmax_type, attn_scale, p_dropout, window_size),
        *((cu_seqlens_q, cu_seqlens_kv), (cu_seqlens_q_padded, cu_seqlens_kv_padded)),
        *((max_seqlen_q, max_seqlen_kv), offset[0] if offset else None),
    )
    generator = _generator(seed[0])
    dQ, dK, dV = (torch.zeros_like(tensor) for tensor in (Q, K, V))
    d_offset = None if not offset else torch.zeros_like(offset[0])
    inputs = ((0, Q), (1, K), (1, V), (0, O), (0, dO), (0, dQ), (1, dK), (1, dV))
    parts = zip(
        *(call.segments(side, tensor.view(*tensor.shape)) for side, tensor in inputs),
        _stats(call, lse, Q),
        strict=True,
    )
    for q, k, v, o, do, dq, dk, dv, lse_HQ in parts:
        if not len(q):
            continue
        logits = call.logits_HQK(q, k)
        weights, do = (logits - lse_HQ[..., None]).exp(), do.float()
        kept = call.kept_HQK(logits, generator)
        over = (do * o.float()).sum(dim=-1).t()[..., None]
        d_logits = weights * (torch.einsum("qhd,khd->hqk", do, _spread(v, q)) * kept - over)
        group = q.shape[1] // k.shape[1]
        dq.copy_(torch.einsum("hqk,khd->qhd", d_logits, _spread(k, q)) * call.scale)
        for target, value in (
            (dk, torch.einsum("hqk,qhd->khd", d_logits, q.float()) * call.scale),
            (dv, torch.einsum("hqk,qhd->khd", weights * kept, do)),
        ):
            target.copy_(value.unflatten(1, (-1, group)).sum(dim=2))
        if d_offset is not None:
            share_HQ = (call.offset_H[:, None] - lse_HQ).exp()
            d_offset.view(-1).sub_((share_HQ * over.squeeze(-1)).sum(dim=-1))
    return [dQ, dK, dV, None, d_offset]
