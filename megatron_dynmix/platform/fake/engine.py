"""Transformer Engine's C++ module in shapes: what its kernels would allocate, and nothing else.

Its Python is the real one: modules, autograd functions and optimizers. Functions have the names and the order
of arguments of the C++ module of 2.9 to 2.11; those that are missing here say so when they are called.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_dynmix.errors import InputError
from megatron_dynmix.platform.fake.process import engine_folder

MODULE = "transformer_engine_torch"


class _Member(str):
    """A member of a C++ enum: its name, which has a number too."""

    def __int__(self) -> int:
        return hash(self)


class _Members(type):
    """A C++ enum: it has whatever member is asked for."""

    def __getattr__(cls, member: str) -> _Member:
        if member.startswith("__"):
            raise AttributeError(member)
        return _Member(f"{cls.__name__}.{member}")


KINDS = {
    "DType.kFloat32": torch.float32,
    "DType.kFloat16": torch.float16,
    "DType.kBFloat16": torch.bfloat16,
    "DType.kInt32": torch.int32,
    "DType.kByte": torch.uint8,
}
"""Types of tensors by their names in C++."""


def _kind(name: str | None, like: Tensor) -> torch.dtype:
    return like.dtype if name is None else KINDS[name]


# ------------------------------------------------------------------------------------------------ products
def generic_gemm(
    a: Tensor,
    trans_a: bool,
    b: Tensor,
    trans_b: bool,
    out: Tensor | None,
    quantizer: Any,
    kind: Any,
    *rest: Any,
    **_: Any,
) -> list[Any]:
    """Return the product in `out`, or in a new tensor."""
    lead = (b.shape[-1],) if trans_b else b.shape[:-1]
    width = a.shape[0] if trans_a and not trans_b else a.shape[-1]
    product = b.new_empty(*lead, width, dtype=_kind(kind, a)) if out is None else out
    return [product, None, rest[3], None]


def te_general_grouped_gemm(
    a: Any, trans_a: bool, b: Any, trans_b: bool, out: Any, *rest: Any, **named: Any
) -> Any:
    """Return the biases: products are written where they are wanted."""
    return named.get("bias") or rest[2]


# --------------------------------------------------------------------------------------- norms and rotary
def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, kind: Any, *rest: Any
) -> Any:
    """Return output, no mean, and the scale of each token."""
    return x.new_empty(x.shape, dtype=_kind(kind, x)), None, x.new_empty(x.shape[:-1], dtype=torch.float32)


def rmsnorm_bwd(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *rest: Any) -> Any:
    """Return gradients of input and weight."""
    return torch.empty_like(x), torch.empty_like(weight)


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    kind: Any,
    *rest: Any,
    **_: Any,
) -> Any:
    """Return output, mean and scale of each token."""
    mean, scale = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=_kind(kind, x)), mean, scale


def layernorm_bwd(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, *rest: Any) -> Any:
    """Return gradients of input, weight and bias."""
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def fused_rope_forward(t: Tensor, *rest: Any) -> Tensor:
    """Return what is rotated."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


fused_rope_backward = fused_rope_forward


# ----------------------------------------------------------------------------------------------- attention
def get_fused_attn_backend(*rest: Any) -> _Member:
    """Return cuDNN's kernel for any length in 16 bits, which a Hopper GPU takes."""
    return _Member("NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen")


def _heads(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Return queries, keys, values: the first tensors that have heads."""
    return [x for x in arguments if isinstance(x, Tensor) and x.dim() >= 3][:3]


def fused_attn_fwd(*arguments: Any) -> list[Tensor]:
    """Return the output, and what the backward pass wants: a number for each query, and a random state."""
    query, _, value = _heads(arguments)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return [
        out,
        query.new_empty(*query.shape[:-1], 1, dtype=torch.float32),
        query.new_empty(2, dtype=torch.int64),
    ]


def fused_attn_bwd(*arguments: Any) -> list[Any]:
    """Return gradients of queries, keys and values."""
    return [*map(torch.empty_like, _heads(arguments)), None, None]


# -------------------------------------------------------------------------------------------------- router
def fused_topk_with_score_function_fwd(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities, choice, and what the backward pass wants."""
    return (
        torch.empty_like(logits),
        torch.empty_like(logits, dtype=torch.bool),
        torch.empty_like(logits, dtype=torch.float32),
    )


def fused_topk_with_score_function_bwd(
    tokens: int, experts: int, routing_map: Tensor, kept: Tensor, grad: Tensor, *rest: Any
) -> Tensor:
    """Return the gradient of the logits."""
    return torch.empty_like(grad)


def fused_score_for_moe_aux_loss_fwd(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, choice, and what the backward pass wants."""
    scores, kept = (torch.empty_like(logits, dtype=torch.float32) for _ in range(2))
    return scores, torch.empty_like(logits, dtype=torch.bool), kept


def fused_score_for_moe_aux_loss_bwd(
    tokens: int, experts: int, kept: Tensor, grad: Tensor, *rest: Any
) -> Tensor:
    """Return the gradient of the logits."""
    return torch.empty_like(grad)


# ----------------------------------------------------------------------------------------------- optimizer
def multi_tensor_adam(*rest: Any) -> None:
    """Step in place."""


multi_tensor_scale = multi_tensor_adam


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], each: bool
) -> tuple[Tensor, Tensor]:
    """Return the norm, and no norm of each."""
    like = lists[0][0]
    return like.new_empty(1, dtype=torch.float32), like.new_empty(len(lists[0]) if each else 0)


# ---------------------------------------------------------------------------------- rows of experts (Triton)
def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape)


def make_row_id_map(routing_map: Tensor, tokens: int, experts: int) -> Tensor:
    """Return the place of each token's rows."""
    return routing_map.new_empty((tokens, experts * 2 + 1), dtype=torch.int32)


def permute_with_mask_map(
    x: Tensor,
    rows: Tensor,
    probs: Any,
    scale: Any,
    tokens: int,
    experts: int,
    out_tokens: int,
    width: int,
    *_: Any,
) -> Any:
    """Return rows of experts, no scales, and their probabilities."""
    return _new(x, out_tokens, width), None, None if probs is None else _new(probs, out_tokens)


def unpermute_with_mask_map(
    x: Tensor, rows: Tensor, merging: Any, probs: Any, tokens: int, experts: int, width: int
) -> Any:
    """Return tokens, and the probabilities of each expert."""
    return _new(x, tokens, width), None if probs is None else _new(probs, tokens, experts)


def unpermute_with_mask_map_bwd_with_merging_probs(
    grad: Tensor,
    rows: Tensor,
    x: Tensor,
    probs: Tensor,
    tokens: int,
    experts: int,
    out_tokens: int,
    width: int,
) -> Any:
    """Return gradients of rows and of the probabilities that merge them."""
    return _new(grad, out_tokens, width), _new(probs, tokens, experts)


def make_chunk_sort_map(sizes: Tensor, order: Tensor, tokens: int, splits: int) -> Tensor:
    """Return the place of each row."""
    return sizes.new_empty((tokens,), dtype=torch.int32)


def sort_chunks_by_map(x: Tensor, rows: Tensor, probs: Any, tokens: int, width: int, is_forward: bool) -> Any:
    """Return sorted rows and probabilities."""
    return _new(x, tokens, width), None if probs is None else _new(probs, tokens)


PERMUTATION = (
    make_row_id_map,
    permute_with_mask_map,
    unpermute_with_mask_map,
    unpermute_with_mask_map_bwd_with_merging_probs,
    make_chunk_sort_map,
    sort_chunks_by_map,
)


def _module() -> types.ModuleType:
    """Return the module: functions of this file, enums of any name, and a refusal of all else."""
    module, here = types.ModuleType(MODULE), vars(sys.modules[__name__])
    module.__dict__.update({name: here[name] for name in here if name.islower() and not name.startswith("_")})
    versions = {"get_cublasLt_version": 130100, "get_cudnn_version": 92000, "get_num_cublas_streams": 4}
    for name, answer in versions.items():
        setattr(module, name, lambda answer=answer: answer)
    module.get_stream_priority_range = lambda *_: (0, 0)  # type: ignore[attr-defined]

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Members(name, (), {}) if name[0].isupper() else _refusal(name)

    module.__getattr__ = missing  # type: ignore[method-assign]
    return module


def _refusal(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise InputError(f"a fake GPU has no stand-in for Transformer Engine's {name}")

    return call


def install() -> None:
    """Have Transformer Engine imported with this module in the place of its C++ one."""
    root = engine_folder()
    assert root is not None, "asked before"
    sys.modules[MODULE] = _module()
    # not by its own __init__, which imports what needs the C++ module of other frameworks too
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(root)]
    package.__spec__ = importlib.util.spec_from_file_location(
        "transformer_engine", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    package.common = common  # type: ignore[attr-defined]
    package.__version__ = importlib.metadata.version("transformer_engine")  # type: ignore[attr-defined]
    package.pytorch = importlib.import_module("transformer_engine.pytorch")  # type: ignore[attr-defined]
    kernels = importlib.import_module("transformer_engine.pytorch.triton.permutation")
    for function in PERMUTATION:
        setattr(kernels, function.__name__, function)
    # a fake tensor is of no type that it knows, and it would choose no kernel for it
    attention = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    choose = attention.get_attention_backend

    def get_attention_backend(attention_params: Any = None) -> Any:
        attention_params.qkv_type = Tensor
        return choose(attention_params)

    attention.get_attention_backend = get_attention_backend  # type: ignore[attr-defined]
