"""Tensors in eight bits, scaled as a whole: by what earlier ones were (delayed), or they are (current)."""

import torch

from tests.te.tex.names import TORCH, DType

LARGEST = {DType.kFloat8E4M3: 448.0, DType.kFloat8E5M2: 57344.0}


def stored(tensor):
    """Values of a quantized tensor in float32, from its rows or, if those are gone, from its columns."""
    data = tensor._data if tensor._data is not None else tensor._transpose.movedim(0, -1)
    return data.view(TORCH[tensor._fp8_dtype]).float() * tensor._scale_inv


def quantize(tensor, quantizer, output=None, noop=None):
    if noop is not None and bool(noop.any()):
        return output
    value, most = tensor.float(), LARGEST[quantizer.dtype]
    largest = value.abs().max() if value.numel() else torch.zeros(())
    if type(quantizer).__name__ == "Float8Quantizer":
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest))
    else:
        assert type(quantizer).__name__ == "Float8CurrentScalingQuantizer", "no stand-in for this recipe"
        if quantizer.with_amax_reduction:
            group = quantizer.amax_reduction_group
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        quantizer.amax.copy_(largest)
        quantizer.scale.copy_(most / largest if largest > 0 else torch.ones(()))
    data = (value * quantizer.scale).clamp(-most, most).to(TORCH[quantizer.dtype]).view(torch.uint8)
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        # of two axes in 2.9 with current scaling
        output._transpose.copy_(data.movedim(-1, 0).reshape(output._transpose.shape))
    output._transpose_invalid = output._transpose is None
    output._scale_inv.copy_(1.0 / quantizer.scale)
    return output


def dequantize(tensor, otype):
    return stored(tensor).to(TORCH[otype])


def split_quantize(tensor, split_sections, quantizers):
    return [
        quantize(part, quantizer)
        for part, quantizer in zip(tensor.split(list(split_sections)), quantizers, strict=True)
    ]


def bgrad_quantize(tensor, quantizer):
    return tensor.reshape(-1, tensor.shape[-1]).float().sum(dim=0).to(tensor.dtype), quantize(
        tensor, quantizer
    )


def fp8_transpose(input, dtype, out=None):
    turned = input.reshape(-1, input.shape[-1]).t().contiguous()
    return turned if out is None else out.copy_(turned.view(out.shape))


def compute_amax(tensor, amax):
    amax.copy_(tensor.float().abs().max())


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer, amax_histories, scales, amax_compute_algo, fp8_dtype, margin
):
    news = amax_reduction_buffer.split([history.shape[1] for history in amax_histories])
    for new, history, scale in zip(news, amax_histories, scales, strict=True):
        history[0].copy_(new)
        largest = history.amax(dim=0) if amax_compute_algo == "max" else history[0].clone()
        usable = (largest > 0) & largest.isfinite()
        scale.copy_(torch.where(usable, LARGEST[fp8_dtype] / largest / 2.0**margin, scale))
        history.copy_(history.roll(-1, dims=0))
        history[0].zero_()


def fused_multi_row_padding(input, output, input_row_list, padded_input_row_list):
    given = input.split(list(input_row_list))
    for rows, padded in zip(given, output.split(list(padded_input_row_list)), strict=True):
        padded.zero_()[: len(rows)].copy_(rows)


def fused_multi_row_unpadding(input, output, input_row_list, unpadded_input_row_list):
    given = input.split(list(input_row_list))
    for padded, rows in zip(given, output.split(list(unpadded_input_row_list)), strict=True):
        rows.copy_(padded[: len(rows)])
