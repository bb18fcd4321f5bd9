"""Matrix products, norms and rotary positions."""

import itertools

import torch

from tests.te.tex.fp8 import stored
from tests.te.tex.names import TORCH, NVTE_QKV_Format


def plain(tensor):
    """A tensor's values in float32, dequantized if need be."""
    return stored(tensor) if hasattr(tensor, "_fp8_dtype") else tensor.float()


def _product(A, transa, B, transb):
    """The product as rows of B, which cuBLAS has as columns."""
    left, right = (value.reshape(-1, value.shape[-1]) for value in (plain(A), plain(B)))
    return (right.t() if transb else right) @ (left.t() if transa else left)


def generic_gemm(
    A,
    transA,
    B,
    transB,
    D,
    quantizer,
    output_dtype,
    bias,
    bias_type,
    gelu,
    gelu_in,
    grad,
    workspace,
    workspace_size,
    accumulate,
    use_split_accumulator,
    comm_overlap=None,
    comm_type=None,
    extra_output=None,
    bulk_overlap=False,
    alpha=1.0,
    beta=None,
):
    assert not gelu and comm_overlap is None, "no fused GELU, no user buffers"
    value, bias_grad = alpha * _product(A, transA, B, transB), None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = plain(B).reshape(-1, B.shape[-1]).sum(dim=0).to(bias.dtype)
        else:
            value = value + bias.float()
    if not transB:
        value = value.reshape(*B.shape[:-1], value.shape[-1])
    if D is not None:
        value = value.view(D.shape).to(D.dtype)
        D.add_(value) if accumulate else D.copy_(value)
    else:
        assert not accumulate
        D = value.to(TORCH[output_dtype] if output_dtype is not None else A.dtype)
        D = D if quantizer is None else quantizer(D)
    return [D, bias_grad, gelu_in, extra_output]


def te_general_grouped_gemm(
    A,
    transa,
    B,
    transb,
    D,
    D_type,
    m_splits,
    bias,
    bias_type,
    single_output,
    pre_gelu_out,
    grad,
    workspace,
    workspace_size,
    accumulate,
    use_split_accumulator,
    math_sm_count,
):
    outputs = D
    if single_output:
        outputs = torch.split(D[0].view(-1, D[0].shape[-1]), [int(rows) for rows in m_splits])
    assert len(A) == len(B) == len(outputs)
    for left, right, output, one_bias in zip(A, B, outputs, bias, strict=True):
        value = _product(left, transa, right, transb) if right.numel() else torch.zeros(output.shape)
        if one_bias.numel() and grad:
            one_bias.copy_(plain(right).reshape(-1, right.shape[-1]).sum(dim=0))
        elif one_bias.numel():
            value = value + one_bias.float()
        value = value.view(output.shape).to(output.dtype)
        output.add_(value) if accumulate else output.copy_(value)
    return bias


# ---- norms


def _gamma(weight, zero_centered_gamma):
    return weight.float() + (1.0 if zero_centered_gamma else 0.0)


def _written(value, output, quantizer, otype):
    if quantizer is not None:
        if output is not None:
            quantizer.update_quantized(value, output)
            return output
        return quantizer(value)
    if output is None:
        return value.to(TORCH[otype])
    return output.copy_(value)


def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    x = input.float()
    rsigma = torch.rsqrt(x.square().mean(dim=-1) + eps)
    y = x * rsigma[..., None] * _gamma(weight, zero_centered_gamma)
    return _written(y, ln_out, quantizer, otype), None, rsigma


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    rsigma = rsigma.view(*x.shape[:-1], 1)
    normal = x.float() * rsigma
    scaled = dz.float() * _gamma(gamma, zero_centered_gamma)
    dx = rsigma * (scaled - normal * (scaled * normal).mean(dim=-1, keepdim=True))
    return dx.to(x.dtype), _over_rows(dz.float() * normal, gamma)


def layernorm_fwd(input, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    x = input.float()
    mu, rsigma = x.mean(dim=-1), torch.rsqrt(x.var(dim=-1, unbiased=False) + eps)
    y = (x - mu[..., None]) * rsigma[..., None] * _gamma(weight, zero_centered_gamma) + bias.float()
    return _written(y, ln_out, quantizer, otype), mu, rsigma


def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma):
    mu, rsigma = (kept.view(*x.shape[:-1], 1) for kept in (mu, rsigma))
    normal = (x.float() - mu) * rsigma
    scaled = dz.float() * _gamma(gamma, zero_centered_gamma)
    along = scaled.mean(dim=-1, keepdim=True) + normal * (scaled * normal).mean(dim=-1, keepdim=True)
    dx = rsigma * (scaled - along)
    return dx.to(x.dtype), _over_rows(dz.float() * normal, gamma), _over_rows(dz.float(), gamma)


def _over_rows(value, like):
    return value.reshape(-1, value.shape[-1]).sum(dim=0).to(like.dtype)


# ---- rotary positions


def _positions(count, cu_seqlens, cp_size, cp_rank):
    """Positions of a rank's tokens; under context parallelism it has two of 2 x ranks parts of a segment."""
    if cu_seqlens is None:
        lengths = [count * cp_size]
    else:
        ends = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    positions = []
    for length in lengths:
        position = torch.arange(length)
        if cp_size > 1:
            assert length % (2 * cp_size) == 0, "a segment is no multiple of 2 x ranks"
            parts = position.chunk(2 * cp_size)
            position = torch.cat([parts[cp_rank], parts[2 * cp_size - 1 - cp_rank]])
        positions.append(position)
    found = torch.cat(positions)
    assert len(found) == count, f"cu_seqlens are of {len(found)} tokens, there are {count}"
    return found


def _rotate(t, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, sign):
    assert start_positions is None
    name = NVTE_QKV_Format(qkv_format).name.removeprefix("NVTE_")
    axis = {"SBHD": 0, "BSHD": 1, "THD": 0}[name]
    assert (cu_seqlens is not None) == (name == "THD")
    position = _positions(t.shape[axis], cu_seqlens, cp_size, cp_rank)
    assert int(position.max()) < freqs.shape[0], "the rotary table is shorter than the longest segment"
    angle = freqs.reshape(freqs.shape[0], -1)[position].float()
    width = angle.shape[-1]
    angle = {"THD": angle[:, None], "SBHD": angle[:, None, None], "BSHD": angle[None, :, None]}[name]
    turned, rest = t[..., :width].float(), t[..., width:]
    if interleaved:
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(start_dim=-2)
    else:
        across = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    turned = turned * angle.cos() + sign * across * angle.sin()
    return torch.cat([turned.to(t.dtype), rest], dim=-1)


def fused_rope_forward(t, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotate(t, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, 1.0)


def fused_rope_backward(t, freqs, *given):
    """Transformer Engine 2.9 gives no start positions here."""
    return _rotate(t, freqs, None, *given[-5:], -1.0)
