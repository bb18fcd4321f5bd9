"""DeepSeek-V2 and V3: latent attention.

Source: `transformers`' models deepseek_v2 and deepseek_v3, and Megatron-Core's `MLATransformerConfig`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.families.dialect import DEEPSEEK_EXPERTS, UNBIASED, Dialect, Only, Values, require_whole
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import (
    DENSE,
    LATENT_ATTENTION,
    MOE_NORM,
    SHARED_EXPERTS,
    NameMap,
    corrected_router,
)

WIDTHS = {
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
"""Our name -> theirs, of the widths of latent attention."""
ONLY = {
    "attention_bias": UNBIASED,
    "moe_layer_freq": Only(1, "only the first layers can be dense"),
    "rope_interleave": Only(True, "Megatron-Core takes pairs of neighbors"),
    "rms_norm_eps": Only(1e-6, "the norms of the latents have this one whatever is said"),
}
CORRECTION = "mlp.gate.e_score_correction_bias"
BEST_OF_GROUP = 2
"""Experts whose scores make that of their group, in DeepSeek-V3."""


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


def own_settings(config: Values) -> dict[str, Any]:
    """Return our settings of latent attention and experts."""
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    require_whole("first_k_dense_replace", dense, 0)
    if dense >= layers:
        raise InputError(
            f"first_k_dense_replace is {dense}, which leaves none of {layers} layers with experts; dense "
            "models are not known"
        )
    shared = config["n_shared_experts"] or 0  # null, in DeepSeek's own code, is none
    require_whole("n_shared_experts", shared, 0)
    scale = config["routed_scaling_factor"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
        raise InputError(f"routed_scaling_factor is {scale!r}; it must be a number above 0")
    return {
        **{ours: config[theirs] for ours, theirs in WIDTHS.items()},
        "q_lora_rank": config["q_lora_rank"],
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)] if dense else 1,
        "moe_shared_expert_intermediate_size": shared * config["moe_intermediate_size"] or None,
        "moe_router_topk_scaling_factor": None if scale == 1 else float(scale),
        **_groups(config),
    }


def _groups(config: Values) -> dict[str, Any]:
    """Return our settings of the groups of experts of which a token goes to a few; V2 has none here."""
    if config.get("topk_method") == "greedy":
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    groups, chosen, experts = config["n_group"], config["topk_group"], config["n_routed_experts"]
    for name, value in (("n_group", groups), ("topk_group", chosen)):
        require_whole(name, value)
    if experts % groups or experts < BEST_OF_GROUP * groups or chosen > groups:
        raise InputError(
            f"n_group is {groups} and topk_group {chosen}, of {experts} experts; groups must be of one size, "
            f"{BEST_OF_GROUP} or more, and topk_group no more than there are"
        )
    if groups == chosen:
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    if config["num_experts_per_tok"] // chosen != BEST_OF_GROUP:
        raise InputError(
            f"num_experts_per_tok is {config['num_experts_per_tok']} and topk_group {chosen}: Megatron-Core "
            "judges a group by so many of its experts as are chosen of it, the model by "
            f"{BEST_OF_GROUP}; only {BEST_OF_GROUP} experts for each group can be run here"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Undo `in_common_words`, and say what `own_settings` reads from our `model` section."""
    frequency, expert = settings["moe_layer_freq"], settings["moe_ffn_hidden_size"]
    shared = settings.get("moe_shared_expert_intermediate_size") or 0
    said = {name: value for name, value in config.items() if name not in ("head_dim", "sliding_window")}
    said |= {theirs: settings[ours] for ours, theirs in WIDTHS.items()}
    groups = settings.get("moe_router_num_groups")
    return said | {
        "q_lora_rank": settings.get("q_lora_rank"),
        "first_k_dense_replace": 0 if frequency == 1 else frequency.index(1),
        "n_shared_experts": shared // expert or None,
        "routed_scaling_factor": settings.get("moe_router_topk_scaling_factor") or 1.0,
        "n_group": groups or 1,
        "topk_group": settings.get("moe_router_group_topk") or 1,
    }


V2 = Family(
    title="DeepSeek-V2-Lite",
    since="0.1.0",
    dialect=Dialect(
        architecture="DeepseekV2ForCausalLM",
        names=DEEPSEEK_EXPERTS,
        fixed={"multi_latent_attention": True, "qk_layernorm": True, "moe_router_pre_softmax": True},
        must={
            **ONLY,
            "mlp_bias": Only(False, "linear layers have no biases here"),
            "scoring_func": Only("softmax", "the model has no other"),
            "topk_method": Only(
                "greedy", "V2 judges a group by its best expert, Megatron-Core by the sum of several"
            ),
            "norm_topk_prob": Only(False, "`transformers` and the published code differ in what true means"),
        },
        plain=in_common_words,
        own=own_settings,
        published=in_own_words,
    ),
    names=NameMap(
        layer=LATENT_ATTENTION,
        moe=(MOE_NORM, *corrected_router(CORRECTION), *SHARED_EXPERTS),
        dense=DENSE,
    ),
)
V3 = replace(
    V2,
    title="DeepSeek-V3 and its like",
    dialect=replace(
        V2.dialect,
        architecture="DeepseekV3ForCausalLM",
        fixed={
            **V2.dialect.fixed,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
        },
        must={
            **ONLY,
            "scoring_func": Only("sigmoid", "the model has no other"),
            "topk_method": Only("noaux_tc", "the model has no other"),
            "norm_topk_prob": Only(True, "Megatron-Core lets sigmoid scores sum to 1"),
        },
    ),
    refused={
        "`n_group` with another number than 2 experts of each chosen group": "Megatron-Core judges a group "
        "by so many of its experts as are chosen of it, the model by its best 2"
    },
)
