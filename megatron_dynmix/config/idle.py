"""Settings of Megatron-Core that do nothing while another one, their master, is off.

Given all the same, such a setting is refused with the name of its master, but not where it has the value that
Megatron-Core or the preset has for it: of that nobody expects anything.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from megatron_dynmix.config.decided import DECIDED
from megatron_dynmix.config.megatron_fields import megatron_fields
from megatron_dynmix.config.presets import COMMON, PRESETS
from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError

_DEFAULTS = {
    name: field.default for owner in reversed(megatron_fields().values()) for name, field in owner.items()
}


class Master(NamedTuple):
    """What must hold of a run for some settings to be read."""

    words: str
    holds: Callable[[SimpleNamespace], Any]
    settings: tuple[str, ...]


def _on(master: str, *settings: str) -> Master:
    words = f"{master} is {'true' if isinstance(_DEFAULTS[master], bool) else 'set'}"
    return Master(words, lambda run: getattr(run, master) not in (None, False), settings)


def _is(master: str, value: str, *settings: str) -> Master:
    return Master(f"{master} is {value}", lambda run: getattr(run, master) == value, settings)


_AUX_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
_GROUPS = ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_limited_devices")
_LAYERS_IN_BF16 = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_OF_DELAYED = (
    *("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad"),
    "fp8_multi_head_attention",
)

_MOE = (
    _on(
        "num_moe_experts",
        *(name for name in _DEFAULTS if name.startswith("moe_") and name not in DECIDED),
        "expert_tensor_parallel_size",
    ),
    Master(
        f"moe_router_load_balancing_type is {', '.join(_AUX_LOSSES[:-1])} or {_AUX_LOSSES[-1]}",
        lambda run: any(kind in run.moe_router_load_balancing_type for kind in _AUX_LOSSES),  # one, or a list
        ("moe_aux_loss_coeff",),
    ),
    Master(
        "moe_router_load_balancing_type is another one than sinkhorn",
        lambda run: run.moe_router_load_balancing_type != "sinkhorn",
        (
            *("moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
            *("moe_router_enable_expert_bias", "moe_router_fusion", *_GROUPS),
        ),
    ),
    _on("moe_router_group_topk", "moe_router_num_groups"),
    _on("moe_router_enable_expert_bias", "moe_router_bias_update_rate"),
    _on("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_drop_policy"),
    _on("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_shared_expert_overlap"),
    _on("moe_grouped_gemm", "moe_use_legacy_grouped_gemm"),
    _is(
        *("moe_token_dispatcher_type", "flex", "moe_enable_deepep", "moe_flex_dispatcher_backend"),
        *("moe_deepep_num_sms", "moe_hybridep_num_sms"),
    ),
    _is("moe_flex_dispatcher_backend", "deepep", "moe_deepep_num_sms"),
    _is("moe_flex_dispatcher_backend", "hybridep", "moe_hybridep_num_sms"),
)

_PRECISION = (
    _on(
        *("fp8", "fp8_recipe", "fp8_param", "fp8_quantizer_factory", "fp8_dot_product_attention"),
        *_OF_DELAYED,
    ),
    _is("fp8_recipe", "delayed", *_OF_DELAYED),
    Master(
        "fp8_recipe is delayed or tensorwise",
        lambda run: run.fp8_recipe in ("delayed", "tensorwise"),
        ("fp8_dot_product_attention",),
    ),
    _is("fp8_recipe", "custom", "fp8_quantizer_factory"),
    _on("fp4", "fp4_recipe", "fp4_param", "fp4_quantizer_factory"),
    _is("fp4_recipe", "custom", "fp4_quantizer_factory"),
    Master(
        "fp8 or fp4 is set",
        lambda run: run.fp8 or run.fp4,
        ("tp_only_amax_red", "first_last_layers_bf16", *_LAYERS_IN_BF16),
    ),
    _on("first_last_layers_bf16", *_LAYERS_IN_BF16),
    Master(
        "fp8, fp4 or gradient_accumulation_fusion is set",  # with the last, the first micro-batch overwrites
        lambda run: run.fp8 or run.fp4 or run.gradient_accumulation_fusion,
        ("disable_parameter_transpose_cache",),
    ),
)

_LAYER = (
    _on("bias_activation_fusion", "activation_func_fp8_input_store"),
    _on("gated_linear_unit", "glu_linear_offset", "activation_func_clamp_value"),
    Master(
        "bias_activation_fusion is false",
        lambda run: not run.bias_activation_fusion,
        ("glu_linear_offset", "activation_func_clamp_value"),
    ),
    _on("window_size", "window_attn_skip_freq"),
    Master(
        "multi_latent_attention is false",
        lambda run: not run.multi_latent_attention,
        (
            *("softmax_scale", "kv_channels", "num_query_groups", "add_qkv_bias"),
            *("attention_output_gate", "no_rope_freq", "test_mode"),
        ),
    ),
    Master(  # without latent attention, `check_settings` has said what it takes
        "rope_type is yarn",
        lambda run: run.rope_type == "yarn" or not run.multi_latent_attention,
        ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"),
    ),
    Master(
        "rope_type is rope",
        lambda run: run.rope_type == "rope" or not run.multi_latent_attention,
        ("rotary_percent",),
    ),
    _on("perform_initialization", "init_method_std", "embedding_init_method_std"),
    _on("cross_entropy_loss_fusion", "cross_entropy_fusion_impl"),
)

_MEMORY = (
    _is("recompute_granularity", "full", "recompute_method", "recompute_num_layers"),
    Master(
        "recompute_granularity is selective",
        lambda run: run.recompute_granularity == "selective" or run.moe_layer_recompute,
        ("recompute_modules",),
    ),
    _on(
        *("cpu_offloading", "cpu_offloading_num_layers", "cpu_offloading_activations"),
        *("cpu_offloading_weights", "cpu_offloading_double_buffering"),
    ),
    _on("fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size"),
)

_LAYOUT = (
    _on("defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
    _on("sequence_parallel", "clone_scatter_output_in_embedding"),
    Master(
        "pipeline_model_parallel_size is 2 or more",
        lambda run: (run.pipeline_model_parallel_size or 1) > 1,
        (
            *("batch_p2p_comm", "batch_p2p_sync", "deallocate_pipeline_outputs"),
            *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
            *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
        ),
    ),
    _on("batch_p2p_comm", "batch_p2p_sync"),
    _on(
        *("virtual_pipeline_model_parallel_size", "microbatch_group_size_per_vp_stage"),
        "overlap_p2p_comm_warmup_flush",
    ),
    _on("overlap_grad_reduce", "bucket_size"),
    _on(
        *("use_distributed_optimizer", "pad_buckets_for_high_nccl_busbw"),
        "reduce_scatter_with_fp32_accumulation",
    ),
    _on("nccl_ub", "disable_symmetric_registration"),
)

_OPTIMIZER = (
    _on("decoupled_lr", "decoupled_min_lr"),
    _on("qk_layernorm", "apply_wd_to_qk_layernorm"),
    Master(
        "weight_decay is above 0",
        lambda run: run.weight_decay,
        ("apply_wd_to_qk_layernorm", "decoupled_weight_decay"),
    ),
)

MASTERS = (*_MOE, *_PRECISION, *_LAYER, *_MEMORY, *_LAYOUT, *_OPTIMIZER)
"""A setting with several masters has the outermost first: it is refused for that one."""


def check_idle(config: RunConfig) -> None:
    """Refuse a setting that would do nothing: the first one found, and what must be on for it."""
    given = {**config.model.flat(), **config.parallel.flat(), **config.optimizer.flat()}
    run = _settings(config)
    heads = run.num_attention_heads
    shape = {"num_query_groups": heads, "kv_channels": heads and run.hidden_size // heads}
    usual = (_DEFAULTS, COMMON, PRESETS.get(config.model.preset or "", {}), shape)
    for master in MASTERS:
        for name in () if master.holds(run) else master.settings:
            if name not in given or any(name in values and values[name] == given[name] for values in usual):
                continue
            value = str(given[name]).lower() if isinstance(given[name], bool) else given[name]
            raise InputError(
                f"{name} is {value}, which does nothing unless {master.words}; see to that, or leave out "
                f"{name}"
            )


def _settings(config: RunConfig) -> SimpleNamespace:
    """Return all settings of Megatron-Core as the run has them."""
    sections = (config.model, config.parallel, config.training, config.optimizer)
    run = SimpleNamespace(**_DEFAULTS)
    for section in sections:
        vars(run).update(section.flat())
    run.overlap_p2p_comm = config.parallel.overlap_p2p_comm
    run.batch_p2p_comm = config.parallel.megatron.get("batch_p2p_comm", not run.overlap_p2p_comm)
    return run
