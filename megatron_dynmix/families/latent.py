"""Latent attention of DeepSeek-V2, which other families took over: keys and values made from one latent.

Source: `transformers`' models deepseek_v2 and deepseek_v3, and Megatron-Core's `MLATransformerConfig`.
"""

from __future__ import annotations

from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.families.dialect import UNBIASED, Only, Values, require_whole

WIDTHS = {
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
"""Our name -> theirs, of the widths of latent attention."""
FIXED = {"multi_latent_attention": True, "qk_layernorm": True}
MUST = {"attention_bias": UNBIASED, "rope_interleave": Only(True, "Megatron-Core rotates pairs of neighbors")}
LATENT_EPSILON = 1e-6
"""That of the norms of the latents, whatever `rms_norm_eps` says of the others."""


def in_common_words(config: Values) -> dict[str, Any]:
    """Say what `config` says as the other families do."""
    for name in ("n_routed_experts", "moe_intermediate_size", *WIDTHS.values()):
        require_whole(name, config.get(name))
    if config.get("q_lora_rank") is not None:
        require_whole("q_lora_rank", config["q_lora_rank"])
    if config.get("num_nextn_predict_layers") is not None:
        require_whole("num_nextn_predict_layers", config["num_nextn_predict_layers"], 0)
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if type(heads) is type(groups) is int and groups < heads:
        raise InputError(
            f"num_key_value_heads is {groups} and num_attention_heads {heads}; in latent attention every "
            "head has keys and values of its own"
        )
    return {name: value for name, value in config.items() if name not in ("head_dim", "num_key_value_heads")}


def attention_settings(config: Values) -> dict[str, Any]:
    """Return our settings of latent attention."""
    usual = config["rms_norm_eps"] == LATENT_EPSILON
    return {
        **{ours: config[theirs] for ours, theirs in WIDTHS.items()},
        "q_lora_rank": config["q_lora_rank"],
        "latent_layernorm_epsilon": None if usual else LATENT_EPSILON,
    }


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Undo `in_common_words`, and say what `attention_settings` reads from our `model` section."""
    said = {name: value for name, value in config.items() if name not in ("head_dim", "sliding_window")}
    widths = {theirs: settings[ours] for ours, theirs in WIDTHS.items()}
    return {**said, **widths, "q_lora_rank": settings.get("q_lora_rank")}
