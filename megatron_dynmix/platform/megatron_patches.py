"""Corrections of Megatron-Core, 0.16.1 to 0.19, that hold on every device; each names what is wrong there.

Those that only a CPU needs are in `cpu.py`. This imports Megatron-Core.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.utils import local_multi_tensor_l2_norm


def complete_without_transformer_engine() -> None:
    """Define what Megatron-Core leaves undefined where there is no Transformer Engine; to be called once."""
    moe_utils.te_general_gemm = None  # named, but defined only where Transformer Engine is
    init = CheckpointWithoutOutput.__init__
    # fp8=False is taken for "some fp8 recipe", because it is not None
    CheckpointWithoutOutput.__init__ = lambda self, fp8=False: init(self, fp8 or None)
    # It takes Transformer Engine to be there wherever names can be imported, then asks for the type None.
    multi_latent_attention.HAVE_TE = False
    multi_latent_attention.Linear = Linear  # its own, which later versions know with Transformer Engine only


def rotate_packed_rows_on_the_device() -> None:
    """Have packed rows rotated without a look at where their segments begin.

    Megatron-Core reads that back in every layer, for queries and for keys, where Transformer Engine's kernel
    does not rotate them: a wait for the device each time.
    """
    rotate = rope_utils._apply_rotary_pos_emb_thd
    if not hasattr(rotate, "__wrapped__"):
        ours = functools.wraps(rotate)(functools.partial(_rotate_packed_rows, rotate))
        rope_utils._apply_rotary_pos_emb_thd = ours


def _rotate_packed_rows(
    theirs: Callable[..., torch.Tensor],
    t: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    *args: Any,
    cp_group: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Rotate `[T, heads, width]`, each position by its place in its segment; `freqs` begin at place 0."""
    if cp_group.size() > 1:  # whose ranks have two parts of each segment
        return theirs(t, cu_seqlens, freqs, *args, cp_group=cp_group, **kwargs)
    position_T = torch.arange(t.shape[0], device=t.device)
    segment_T = torch.bucketize(position_T, cu_seqlens[1:], right=True)
    freqs_T = freqs[position_T - cu_seqlens[segment_T]]
    return rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs_T, *args, **kwargs).squeeze(1)


def update_expert_bias_exactly() -> None:
    """Have expert biases moved by what integer counts say.

    Megatron-Core takes the mean of the counts in float32, whose rounding can turn the sign of a difference.
    """
    module = sys.modules[finalize_model_grads.__module__]
    module.get_updated_expert_bias = _updated_expert_bias  # type: ignore[attr-defined]


def _updated_expert_bias(
    tokens_LE: torch.Tensor, bias_LE: torch.Tensor, rate: float, **groups: Any
) -> torch.Tensor:
    """Return biases of L layers and E experts a step `rate` nearer to even loads."""
    ranks = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(tokens_LE, group=ranks)
    missing_LE = tokens_LE.sum(dim=-1, keepdim=True) - tokens_LE * tokens_LE.shape[-1]
    return bias_LE + torch.sign(missing_LE) * rate


def measure_huge_gradients() -> None:
    """Have the norm of finite gradients be finite.

    Megatron-Core sums squares in float32: beyond 2e19 its norm is infinite, and clipping leaves zeros.
    """
    measured = optimizer.get_grad_norm_fp32
    if not hasattr(measured, "__wrapped__"):
        optimizer.get_grad_norm_fp32 = functools.wraps(measured)(functools.partial(_norm, measured))


def _norm(measured: Callable[..., float], grads: list[torch.Tensor], **kwargs: Any) -> float:
    norm = measured(grads, **kwargs)
    if not math.isinf(norm):
        return norm
    square = torch.zeros((), dtype=torch.float64, device="cuda")  # the CPU's own, where `cpu.py` stands in
    for grad in grads:
        square += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    torch.distributed.all_reduce(square, group=kwargs["grad_stats_parallel_group"])
    return math.sqrt(square.item())


def measure_gradients_together() -> None:
    """Have the norm of gradients stay on the device where neither Transformer Engine nor apex measures it.

    Megatron-Core's own way reads the norm of every tensor back, one after another.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm_of_all


def _norm_of_all(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], *unused: Any
) -> tuple[torch.Tensor, None]:
    """Return the norm of all tensors together, as a tensor of one number."""
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms))[None], None


def use_results_queue(queue: Any) -> None:
    """Have the next writer of shards send its results through `queue`.

    Megatron-Core would start a manager process for one, which outlives a rank that is killed.
    """
    filesystem_async._results_queue = queue
