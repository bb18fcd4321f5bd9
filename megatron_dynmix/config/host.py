"""What a host, or the attention that runs there, cannot do; one line for each setting.

Megatron-Core finds most of this only while it builds or runs the model, in terms of its own; some of it
would silently have no effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the ranks of a run have."""

    cuda: bool
    transformer_engine: bool
    deep_ep: bool = False
    wandb: bool = False


@dataclass(frozen=True)
class Need:
    """A setting that not every host can follow."""

    setting: str
    values: Callable[[Any], bool]
    """Whether a value asks for what is needed."""
    met: Callable[[Host, RunConfig], bool]
    what: str
    instead: str


def _cuda(host: Host, _: RunConfig) -> bool:
    return host.cuda


def _te(host: Host, _: RunConfig) -> bool:
    return host.cuda and host.transformer_engine


def _te_attention(host: Host, config: RunConfig) -> bool:
    return _te(host, config) and config.parallel.size("context_parallel_size") == 1


def _te_norms(host: Host, config: RunConfig) -> bool:
    return _te(host, config) and not config.model.qk_layernorm_full_width


def _deep_ep(host: Host, _: RunConfig) -> bool:
    return host.cuda and host.deep_ep


def _is(*wanted: Any) -> Callable[[Any], bool]:
    return lambda value: value in wanted


_TE = "Transformer Engine on a CUDA device"
_TE_ATTENTION = "Transformer Engine's attention: CUDA, and context_parallel_size 1"
_OUT = "leave it out"

NEEDS = (
    Need("moe_token_dispatcher_type", _is("flex"), _deep_ep, "CUDA and DeepEP", "use alltoall or allgather"),
    Need("moe_grouped_gemm", bool, _te, _TE, "leave it out: experts then run one after another"),
    Need("moe_use_legacy_grouped_gemm", bool, _te, _TE, _OUT),
    Need("moe_permute_fusion", bool, _te, _TE, _OUT),
    Need("moe_router_fusion", bool, _te, _TE, _OUT),
    Need("moe_latent_size", bool, _te, _TE, _OUT),
    Need("recompute_modules", lambda modules: "moe_act" in (modules or []), _te, _TE, "use [moe] instead"),
    Need("use_precision_aware_optimizer", bool, _te, _TE, _OUT),
    Need("apply_rope_fusion", bool, _te, _TE, _OUT),
    Need("gradient_accumulation_fusion", bool, _te, _TE, _OUT),
    Need("tp_comm_overlap", bool, _te, _TE, _OUT),
    Need("cpu_offloading", bool, _te, _TE, _OUT),
    Need("use_te_rng_tracker", bool, _te, _TE, _OUT),
    Need("use_te_activation_func", bool, _te, _TE, _OUT),
    Need("cross_entropy_fusion_impl", _is("te"), _te, _TE, "use native"),
    Need("fp8", bool, _te, _TE, "use --bf16"),
    Need("fp4", bool, _te, _TE, "use --bf16"),
    Need("layernorm_zero_centered_gamma", bool, _te_norms, "Transformer Engine's norms", _OUT),
    Need("window_size", bool, _te_attention, _TE_ATTENTION, _OUT),
    Need("softmax_type", lambda kind: kind != "vanilla", _te_attention, _TE_ATTENTION, "use vanilla"),
    Need("qk_clip", bool, _te_attention, _TE_ATTENTION, _OUT),
    Need("log_max_attention_logit", bool, _te_attention, _TE_ATTENTION, _OUT),
    Need("fp8_dot_product_attention", bool, _te_attention, _TE_ATTENTION, _OUT),
    Need("masked_softmax_fusion", bool, _te_attention, _TE_ATTENTION, _OUT),
    Need("apply_query_key_layer_scaling", bool, _te_attention, _TE_ATTENTION, _OUT),
    Need("fine_grained_activation_offloading", bool, _cuda, "CUDA", _OUT),
    Need("nccl_ub", bool, _cuda, "NCCL", _OUT),
    Need("pipeline_model_parallel_comm_backend", bool, _cuda, "NCCL", _OUT),
)
SHAPES = {"moe_latent_size", "multi_latent_attention"}
"""Those of `NEEDS` that decide which tensors the model has."""


def check_host(config: RunConfig, host: Host) -> None:
    """Refuse a setting that this host cannot follow.

    Raises:
        InputError: the first one found, with what it needs and what would do instead.

    """
    given = {**config.model.megatron, **config.parallel.megatron, **config.optimizer.megatron}
    for need in NEEDS:
        value = given.get(need.setting)
        if value is not None and need.values(value) and not need.met(host, config):
            shown = str(value).lower() if isinstance(value, bool) else value
            raise InputError(f"{need.setting} is {shown}, which needs {need.what}; {need.instead}")
    if config.parallel.virtual_stages and not config.parallel.overlap_p2p_comm and not host.cuda:
        raise InputError(
            "an interleaved pipeline without overlap_p2p_comm needs NCCL: over gloo its messages mix and "
            "results are wrong; leave out overlap_p2p_comm and batch_p2p_comm"
        )
    _check_packed_rows(config, host)
    if config.logging.wandb_project is not None and not host.wandb:
        raise InputError(
            f"wandb_project is {config.logging.wandb_project}, but the package wandb is not installed here; "
            "pip install 'megatron-dynmix[wandb]', or leave it out"
        )


def without_unmet(config: RunConfig, host: Host) -> RunConfig:
    """Return the run as this host could follow it, to check a layout meant for another one.

    Ways to compute are left out (Megatron-Core refuses some of them without Transformer Engine); shapes and
    group sizes stay.
    """
    unmet = {
        need.setting: need.values
        for need in NEEDS
        if need.setting not in SHAPES and not need.met(host, config)
    }

    def kept(section: Any) -> Any:
        settings = section.megatron.items()
        kept = {name: value for name, value in settings if name not in unmet or not unmet[name](value)}
        return dataclasses.replace(section, megatron=kept)

    return dataclasses.replace(
        config, model=kept(config.model), parallel=kept(config.parallel), optimizer=kept(config.optimizer)
    )


def _check_packed_rows(config: RunConfig, host: Host) -> None:
    """Refuse rows that Transformer Engine, which packs a micro-batch in 16 bits, would misread."""
    if not host.transformer_engine or config.parallel.size("context_parallel_size") > 1:
        return
    if not config.training.bf16:
        raise InputError("Transformer Engine attends to packed rows in bf16 only; add --bf16")
    if "seq_aux_loss" in str(config.model.megatron.get("moe_router_load_balancing_type")):
        raise InputError(
            "moe_router_load_balancing_type seq_aux_loss would balance over a whole micro-batch: with "
            "Transformer Engine its rows are one sequence; use aux_loss or global_aux_loss"
        )
