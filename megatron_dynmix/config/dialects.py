"""How config.json of each family of Hugging Face models says what our settings say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dynmix.config import deepseek, llama_moe

Values = Mapping[str, Any]

NAMES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "moe_router_topk": "num_experts_per_tok",
    "layernorm_epsilon": "rms_norm_eps",
}
"""Our name -> that in config.json, for what every family has and must say."""
FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
}
"""Settings that are the same in every family."""
PLAIN: dict[str, Any] = {
    **FIXED,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_interleaved": False,
    "window_size": None,
    "softmax_scale": None,
    "multi_latent_attention": False,
    "attention_output_gate": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_enable_expert_bias": False,
    "moe_apply_probs_on_input": False,
    "moe_router_topk_limited_devices": None,
    "moe_latent_size": None,
    "softmax_type": "vanilla",
    "no_rope_freq": None,
    "linear_attention_freq": None,
    "experimental_attention_variant": None,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "mtp_num_layers": None,
    "heterogeneous_block_specs": False,
    "router_network": "linear",
    "router_noise": None,
}
"""Settings that change what a model computes, and that config.json means without a word for them."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How config.json of one family says what our settings say."""

    architecture: str
    names: Mapping[str, str]
    """Our name -> theirs, beside `NAMES`."""
    switches: Mapping[str, tuple[str, bool, bool]] = field(default_factory=dict)
    """Our switch -> (theirs, what it is if not said, whether ours is the opposite)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that all models of the family have."""
    must: Mapping[str, Any] = field(default_factory=dict)
    """Their settings that we can run with one value only, which is also what it means if they are absent."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding if it is not said."""
    mixed: bool = False
    """Whether layers can be dense: `decoder_sparse_step` and `mlp_only_layers`."""
    plain: Callable[[Values], dict[str, Any]] = dict
    """Their config.json in the words of the other families."""
    own: Callable[[Values], dict[str, Any]] = lambda config: {}
    """Settings that only this family has words for."""
    published: Callable[[Values, Values], dict[str, Any]] = lambda config, settings: dict(config)
    """Their own words again, from config.json and the settings it was made from."""


PRE_SOFTMAX = {"moe_router_pre_softmax": ("norm_topk_prob", False, True)}
"""Weights of the chosen experts that sum to 1 are a softmax over these alone, taken after the choice."""
QWEN_EXPERTS = {"num_moe_experts": "num_experts", "moe_ffn_hidden_size": "moe_intermediate_size"}
NO_SHARED = {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}
DEEPSEEK_EXPERTS = {"num_moe_experts": "n_routed_experts", "moe_ffn_hidden_size": "moe_intermediate_size"}
LATENT_ATTENTION = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "add_qkv_bias": False,
    "moe_shared_expert_gate": False,
}
DIALECTS: dict[str, Dialect] = {
    "mixtral": Dialect(
        architecture="MixtralForCausalLM",
        names={"num_moe_experts": "num_local_experts"},
        fixed={
            "moe_router_pre_softmax": False,
            "qk_layernorm": False,
            "add_qkv_bias": False,
            **NO_SHARED,
        },
        must={"router_jitter_noise": 0.0, "attention_bias": False},
        rope_theta=1e6,
    ),
    "qwen3_moe": Dialect(
        architecture="Qwen3MoeForCausalLM",
        names=QWEN_EXPERTS,
        switches=PRE_SOFTMAX,
        fixed={"qk_layernorm": True, "add_qkv_bias": False, **NO_SHARED},
        must={"attention_bias": False},
        mixed=True,
    ),
    "olmoe": Dialect(
        architecture="OlmoeForCausalLM",
        names={"num_moe_experts": "num_experts"},
        switches=PRE_SOFTMAX,
        fixed={"qk_layernorm": True, "qk_layernorm_full_width": True, "add_qkv_bias": False, **NO_SHARED},
        must={"attention_bias": False, "clip_qkv": None},
    ),
    "qwen2_moe": Dialect(
        architecture="Qwen2MoeForCausalLM",
        names={
            **QWEN_EXPERTS,
            "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        },
        switches={**PRE_SOFTMAX, "add_qkv_bias": ("qkv_bias", True, False)},
        fixed={"qk_layernorm": False, "moe_shared_expert_gate": True},
        mixed=True,
    ),
    "llama_moe": Dialect(
        architecture="LlamaMoEForCausalLM",
        names={"num_moe_experts": "num_experts"},
        fixed={
            "moe_router_pre_softmax": False,
            "qk_layernorm": False,
            "add_qkv_bias": False,
            "router_network": "mlp",
            **NO_SHARED,
        },
        must=llama_moe.ONLY,
        plain=llama_moe.in_common_words,
        own=llama_moe.router_settings,
        published=llama_moe.in_own_words,
    ),
    "deepseek_v2": Dialect(
        architecture="DeepseekV2ForCausalLM",
        names=DEEPSEEK_EXPERTS,
        fixed={**LATENT_ATTENTION, "moe_router_pre_softmax": True},
        must=deepseek.V2_ONLY,
        plain=deepseek.in_common_words,
        own=deepseek.own_settings,
        published=deepseek.in_own_words,
    ),
    "deepseek_v3": Dialect(
        architecture="DeepseekV3ForCausalLM",
        names=DEEPSEEK_EXPERTS,
        fixed={
            **LATENT_ATTENTION,
            "moe_router_pre_softmax": True,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
        },
        must=deepseek.V3_ONLY,
        plain=deepseek.in_common_words,
        own=deepseek.own_settings,
        published=deepseek.in_own_words,
    ),
}
"""The `model_type` of config.json -> how that family says it."""
