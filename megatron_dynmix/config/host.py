"""What a host, or the attention that runs there, cannot do; one line for each setting.

Megatron-Core finds most of this only while it builds or runs the model, in terms of its own; some of it
would silently have no effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_dynmix.config.rotary import yarn_of
from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the ranks of a run have."""

    cuda: bool
    transformer_engine: bool
    transformer_engine_error: str = ""
    """Why it cannot be used though it is installed, and the remedy."""
    deep_ep: bool = False
    hybrid_ep: bool = False
    """The part of some builds of DeepEP that has a buffer of its own."""
    fused_weight_gradient_mlp_cuda: bool = False
    """The part of apex that adds up weights' gradients."""
    grouped_gemm: bool = False
    wandb: bool = False


class Need(NamedTuple):
    """A setting that not every host can follow."""

    setting: str
    values: Callable[[Any], bool]
    """Whether a value asks for what is needed."""
    what: str
    """What is needed: a key of `_offered`."""
    instead: str


_CUDA, _NCCL, _DEEP_EP = "CUDA", "NCCL", "CUDA and DeepEP"
_HYBRID_EP = "CUDA and a DeepEP that has HybridEP"
_TE = "Transformer Engine on a CUDA device"
_TE_AND_APEX = "Transformer Engine on a CUDA device, and apex built with --cuda_ext"
_TE_AND_GROUPED = "Transformer Engine on a CUDA device, and the package grouped_gemm"
_TE_NORMS = "Transformer Engine's norms"
_TE_ATTENTION = "Transformer Engine's attention: CUDA, context_parallel_size 1 and softmax_type vanilla"
_OF_TE = (_TE, _TE_AND_APEX, _TE_AND_GROUPED, _TE_NORMS, _TE_ATTENTION)
_OUT = "leave it out"

NEEDS = (
    Need("moe_token_dispatcher_type", lambda kind: kind == "flex", _DEEP_EP, "use alltoall or allgather"),
    Need("moe_flex_dispatcher_backend", lambda kind: kind == "hybridep", _HYBRID_EP, "use deepep"),
    Need("moe_grouped_gemm", bool, _TE, "leave it out: experts then run one after another"),
    Need("recompute_modules", lambda modules: "moe_act" in (modules or []), _TE, "use [moe] instead"),
    Need("cross_entropy_fusion_impl", lambda kind: kind == "te", _TE, "use native"),
    Need("fp8", bool, _TE, "use --bf16"),
    Need("fp4", bool, _TE, "use --bf16"),
    *(
        Need(setting, bool, _TE, _OUT)
        for setting in (
            *("moe_permute_fusion", "moe_router_fusion", "moe_latent_size", "apply_rope_fusion"),
            "cpu_offloading",
        )
    ),
    Need("gradient_accumulation_fusion", bool, _TE_AND_APEX, _OUT),
    Need("moe_use_legacy_grouped_gemm", bool, _TE_AND_GROUPED, "use moe_grouped_gemm"),
    Need("layernorm_zero_centered_gamma", bool, _TE_NORMS, _OUT),
    Need("attention_backend", lambda kind: kind != "auto", _TE_ATTENTION, "use auto"),
    Need("fp8_dot_product_attention", bool, _TE_ATTENTION, _OUT),
    Need("fine_grained_activation_offloading", bool, _CUDA, _OUT),
    Need("nccl_ub", bool, _NCCL, _OUT),
)


def _offered(host: Host, config: RunConfig) -> dict[str, bool]:
    """Return whether each thing needed is there for the run on such a host."""
    engine = host.cuda and host.transformer_engine
    alone = config.parallel.size("context_parallel_size") == 1
    return {
        _CUDA: host.cuda,
        _NCCL: host.cuda,
        _DEEP_EP: host.cuda and host.deep_ep,
        _HYBRID_EP: host.cuda and host.hybrid_ep,
        _TE: engine,
        _TE_AND_APEX: engine and host.fused_weight_gradient_mlp_cuda,
        _TE_AND_GROUPED: engine and host.grouped_gemm,
        _TE_NORMS: engine and not config.model.qk_layernorm_full_width,
        _TE_ATTENTION: engine and alone and not _has_sinks(config),
    }


def check_host(config: RunConfig, host: Host) -> None:
    """Refuse a setting that this host cannot follow: the first one found, and what would do instead."""
    offered = _offered(host, config)
    given = {**config.model.megatron, **config.parallel.megatron, **config.optimizer.megatron}
    for need in NEEDS:
        value = given.get(need.setting)
        if value is not None and need.values(value) and not offered[need.what]:
            shown = str(value).lower() if isinstance(value, bool) else value
            error = f". {host.transformer_engine_error}" if need.what in _OF_TE and host.cuda else ""
            raise InputError(f"{need.setting} is {shown}, which needs {need.what}; {need.instead}{error}")
    if config.parallel.virtual_stages and not config.parallel.overlap_p2p_comm and not host.cuda:
        raise InputError(
            "an interleaved pipeline without overlap_p2p_comm needs NCCL: over gloo its messages mix and "
            "results are wrong; leave out overlap_p2p_comm and batch_p2p_comm"
        )
    if config.parallel.overlap_p2p_comm and given.get("deallocate_pipeline_outputs") and not host.cuda:
        raise InputError(
            "deallocate_pipeline_outputs is true with overlap_p2p_comm, which needs NCCL: gloo may still be "
            "sending what is let go; leave it out"
        )
    _check_packed_rows(config, host)
    if config.logging.wandb_project is not None and not host.wandb:
        raise InputError(
            f"wandb_project is {config.logging.wandb_project}, but the package wandb is not installed here; "
            "pip install 'megatron-dynmix[wandb]', or leave it out"
        )


def with_defaults(config: RunConfig, host: Host) -> RunConfig:
    """Return the run with the ways to compute that this host takes where nothing is said.

    They are the host's and not the run's, which may go on elsewhere: nothing of it is recorded.
    """
    given, layout = config.model.megatron, config.parallel.megatron
    other_rotary = given.get("multi_latent_attention") or given.get("rotary_interleaved") or yarn_of(given)
    biased = given.get("add_bias_linear") and given.get("moe_grouped_gemm")
    usual = {"bias_dropout_fusion": host.cuda and not biased}  # as Megatron-LM; grouped experts refuse both
    if _offered(host, config)[_TE] and not other_rotary:
        usual["apply_rope_fusion"] = True
    # as Megatron-LM; but gloo may still be sending what an overlapped pipeline lets go
    overlap = config.parallel.virtual_stages and config.parallel.overlap_p2p_comm
    let_go = {"deallocate_pipeline_outputs": host.cuda or not overlap}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, megatron={**usual, **given}),
        parallel=dataclasses.replace(config.parallel, megatron={**let_go, **layout}),
    )


def without_unmet(config: RunConfig, host: Host) -> RunConfig:
    """Return the run as this host could follow it, to check a layout meant for another one.

    Ways to compute are left out (Megatron-Core refuses some of them without Transformer Engine); shapes and
    group sizes stay.
    """
    offered = _offered(host, config)
    unmet = {need.setting: need.values for need in NEEDS if not offered[need.what]}
    unmet.pop("moe_latent_size", None)  # a shape

    def kept(section: Any) -> Any:
        settings = section.megatron.items()
        kept = {name: value for name, value in settings if name not in unmet or not unmet[name](value)}
        return dataclasses.replace(section, megatron=kept)

    return dataclasses.replace(
        config, model=kept(config.model), parallel=kept(config.parallel), optimizer=kept(config.optimizer)
    )


def joins_rows(config: RunConfig, transformer_engine: bool) -> bool:
    """Whether attention takes all rows of a micro-batch as one sequence, with the borders of the segments.

    Otherwise it takes a block-diagonal mask. Under context parallelism Transformer Engine wants every
    segment to be as long as a multiple of 2 x ranks, of which each rank has two equal parts. Attention with
    experts is done without it, row by row, and so is attention with sinks, which it has not for joined rows.
    """
    if config.model.attention_experts is not None:
        return False
    cp = config.parallel.size("context_parallel_size")
    divides = cp == 1 or config.data.segment_multiple % (2 * cp) == 0
    return transformer_engine and divides and not _has_sinks(config)


def _has_sinks(config: RunConfig) -> bool:
    """Whether a softmax over keys has one term more, which nothing is read from."""
    return config.model.megatron.get("softmax_type", "vanilla") != "vanilla"


def _check_packed_rows(config: RunConfig, host: Host) -> None:
    """Refuse rows that Transformer Engine, which packs a micro-batch in 16 bits, would misread."""
    if not joins_rows(config, host.transformer_engine):
        return
    if not config.training.bf16:
        raise InputError("Transformer Engine attends to packed rows in bf16 only; add --bf16")
    given = config.model.megatron
    if given.get("attention_backend") == "local":
        raise InputError(
            "attention_backend is local, which turns off every kernel that Transformer Engine has; use auto"
        )
    if given.get("apply_rope_fusion") and given.get("rotary_interleaved"):
        raise InputError(
            "apply_rope_fusion and rotary_interleaved are true: Megatron-Core tells the fused kernel for "
            "packed rows only of the first; leave out apply_rope_fusion"
        )
    heads, groups = given.get("num_attention_heads"), given.get("num_query_groups")
    if given.get("multi_latent_attention") and groups not in (None, heads):
        raise InputError(
            f"num_query_groups is {groups}, but latent attention has keys and values for each of the {heads} "
            f"heads, and Transformer Engine counts them; give num_query_groups {heads}"
        )
    if "seq_aux_loss" in str(given.get("moe_router_load_balancing_type")):
        raise InputError(
            "moe_router_load_balancing_type seq_aux_loss would balance over a whole micro-batch: with "
            "Transformer Engine its rows are one sequence; use aux_loss or global_aux_loss"
        )
