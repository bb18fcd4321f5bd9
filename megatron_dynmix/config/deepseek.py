"""What config.json of DeepSeek-V2 and V3 says in words of its own.

Source: `transformers`' models deepseek_v2 and deepseek_v3, and Megatron-Core's `MLATransformerConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dynmix.errors import InputError

Values = Mapping[str, Any]

WIDTHS = {
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
"""Our name -> theirs, of the widths of latent attention."""
YARN: dict[str, tuple[str, Any]] = {
    "rotary_scaling_factor": ("factor", None),
    "original_max_position_embeddings": ("original_max_position_embeddings", None),
    "beta_fast": ("beta_fast", 32),
    "beta_slow": ("beta_slow", 1),
    "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
}
"""Our name -> theirs, and what it is if not said, of rotary embeddings stretched to longer sequences."""
HARMLESS = {"truncate": True, "partial_rotary_factor": 1.0}
"""What YaRN may be said to do besides: it does so anyway."""
ONLY: dict[str, Any] = {
    "attention_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "rms_norm_eps": 1e-6,  # the norms of the latents have this one whatever is said
}
V2_ONLY = {**ONLY, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
V3_ONLY = {**ONLY, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
BEST_OF_GROUP = 2
"""Experts whose scores make that of their group, in DeepSeek-V3."""


def in_common_words(config: Values) -> dict[str, Any]:
    """Say what `config` says as the other families do; what they have no words for stands under `yarn`."""
    for name in ("n_routed_experts", "moe_intermediate_size", *WIDTHS.values()):
        if not isinstance(config.get(name), int):
            raise InputError(f"{name} is {config.get(name)!r}; it must be a whole number, 1 or more")
    predicting = config.get("num_nextn_predict_layers")
    if predicting is not None and (type(predicting) is not int or predicting < 0):
        raise InputError(f"num_nextn_predict_layers is {predicting!r}; it must be a whole number, 0 or more")
    left_out = ("head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters")
    said = {name: value for name, value in config.items() if name not in left_out}
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    said["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if kind == "yarn":
        said["yarn"] = _yarn(rope)
    elif kind != "default":
        raise InputError(f"the rotary embedding is of type {kind}; only default and yarn can be run here")
    return said


def _yarn(rope: Values) -> dict[str, Any]:
    """Return our settings of a rotary embedding stretched by YaRN."""
    given = {name: value for name, value in rope.items() if value is not None}
    known = {theirs for theirs, _ in YARN.values()} | {"type", "rope_type", "rope_theta"}
    settings = {ours: given.get(theirs, default) for ours, (theirs, default) in YARN.items()}
    for name in sorted(given.keys() - known):
        if name not in HARMLESS or given[name] != HARMLESS[name]:
            raise InputError(f"rope_scaling says {name} {given[name]!r}, which Megatron-Core does not have")
    for ours in ("rotary_scaling_factor", "original_max_position_embeddings"):
        if not isinstance(settings[ours], int | float):
            raise InputError(
                f"rope_scaling is of type yarn and says no {YARN[ours][0]}; add it to config.json"
            )
    # the model takes both or neither; Megatron-Core each by itself, which is the same for an mscale of 1
    if bool(settings["mscale_all_dim"]) != bool(given.get("mscale")) and given.get("mscale", 0) != 1:
        raise InputError(
            f"rope_scaling says mscale {given.get('mscale')} and mscale_all_dim "
            f"{given.get('mscale_all_dim')}: with one of them alone the model is not what Megatron-Core "
            "computes; only both can be run here"
        )
    return settings


def own_settings(config: Values) -> dict[str, Any]:
    """Return our settings of latent attention, rotary embedding and experts."""
    yarn = config.get("yarn")
    dense = config.get("first_k_dense_replace") or 0
    layers = config.get("num_hidden_layers") or 0
    shared = config.get("n_shared_experts") or 0
    scale = float(config.get("routed_scaling_factor", 1.0))
    return {
        **{ours: config.get(theirs) for ours, theirs in WIDTHS.items()},
        "q_lora_rank": config.get("q_lora_rank"),
        "rope_type": "yarn" if yarn else "rope",
        **(yarn or {}),
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)] if dense else 1,
        "moe_shared_expert_intermediate_size": shared * config.get("moe_intermediate_size", 0) or None,
        "moe_router_topk_scaling_factor": None if scale == 1 else scale,
        **_groups(config),
    }


def _groups(config: Values) -> dict[str, Any]:
    if config.get("topk_method") == "greedy" or (config.get("n_group") or 1) == 1:
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    chosen = config.get("topk_group") or 1
    if config["num_experts_per_tok"] // chosen != BEST_OF_GROUP:
        raise InputError(
            f"num_experts_per_tok is {config['num_experts_per_tok']} and topk_group {chosen}: Megatron-Core "
            "judges a group by so many of its experts as are chosen of it, the model by "
            f"{BEST_OF_GROUP}; only {BEST_OF_GROUP} experts for each group can be run here"
        )
    return {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": chosen}


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Undo `in_common_words`, and say what `own_settings` reads from our `model` section."""
    frequency, expert = settings["moe_layer_freq"], settings["moe_ffn_hidden_size"]
    shared = settings.get("moe_shared_expert_intermediate_size") or 0
    said = {name: value for name, value in config.items() if name not in ("head_dim", "sliding_window")}
    said |= {theirs: settings[ours] for ours, theirs in WIDTHS.items()}
    if settings["rope_type"] == "yarn":
        yarn = {theirs: settings[ours] for ours, (theirs, _) in YARN.items()}
        said["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **yarn}
    groups = settings.get("moe_router_num_groups")
    return said | {
        "q_lora_rank": settings.get("q_lora_rank"),
        "first_k_dense_replace": 0 if frequency == 1 else frequency.index(1),
        "n_shared_experts": shared // expert or None,
        "routed_scaling_factor": settings.get("moe_router_topk_scaling_factor") or 1.0,
        "n_group": groups or 1,
        "topk_group": settings.get("moe_router_group_topk") or 1,
    }
