"""Tiny models of families, those that share parts with DeepSeek and Granite, made by transformers."""

import transformers

from tests import deepseek_models

SIZES = {
    "vocab_size": 131,
    "hidden_size": 30,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {
    "intermediate_size": 22,
    "moe_intermediate_size": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 10}
LATENT = {
    name: deepseek_models.COMMON[name]
    for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "num_key_value_heads")
}
ROPE = {"rope_type": "default", "rope_theta": 50.0}
GRANITE = {
    **{"intermediate_size": 14, "num_local_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    **{"embedding_multiplier": 2.5, "residual_multiplier": 0.6, "logits_scaling": 1.7},
    "attention_multiplier": 0.7,
    "rms_norm_eps": 1e-2,
    "hidden_size": 36,
    "rope_parameters": ROPE,
}
MODELS = {
    "GLM-4.5": (
        "glm4_moe",
        {
            **EXPERTS,
            **GROUPED,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.4},
        },
    ),
    "GLM-4.5-Air": ("glm4_moe", {**EXPERTS, **GROUPED, "attention_bias": True, "rms_norm_eps": 1e-2}),
    "GLM-4.7-Flash": (
        "glm4_moe_lite",
        {
            **EXPERTS,
            **LATENT,
            "q_lora_rank": 20,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "rms_norm_eps": 1e-2,
            "rope_parameters": ROPE,
        },
    ),
    "Moonlight": (
        "deepseek_v3",
        {
            **EXPERTS,
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rms_norm_eps": 1e-2,
            "rope_parameters": ROPE,
        },
    ),
    "dots.llm1": (
        "dots1",
        {
            **EXPERTS,
            **GROUPED,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "sliding_window": None,
            "rope_parameters": ROPE,
        },
    ),
    "MiniMax-M2": (
        "minimax_m2",
        {
            **GROUPED,
            "intermediate_size": 14,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.6},
        },
    ),
    "Granite": ("granitemoe", {**GRANITE, "tie_word_embeddings": True}),
    "Granite, shared experts": ("granitemoeshared", {**GRANITE, "shared_intermediate_size": 18}),
}
"""Name -> family, what it has beside `SIZES`."""


def tiny_config(name, **changes):
    """The configuration of a model, with changes to it."""
    family, own = MODELS[name]
    return transformers.AutoConfig.for_model(family, **{**SIZES, **own, **changes})


def tiny_model(name, **changes):
    """A model with random weights, the corrections of its routers' choices among them."""
    return deepseek_models.randomized(tiny_config(name, **changes))
