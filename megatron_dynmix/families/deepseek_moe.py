"""The experts of DeepSeek-V3, which other families took over: sigmoid scores, a correction of the choice,
groups of experts, shared experts, and dense layers before those with experts.

Source: `transformers`' models deepseek_v3, glm4_moe and dots1, and Megatron-Core's router.
"""

from __future__ import annotations

from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.families.dialect import Only, Values, require_whole
from megatron_dynmix.families.names import MOE_NORM, SHARED_EXPERTS, Rules, corrected_router

EXPERTS = {"num_moe_experts": "n_routed_experts", "moe_ffn_hidden_size": "moe_intermediate_size"}
SIGMOID = {
    "moe_router_pre_softmax": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
SUMS = {"norm_topk_prob": Only(True, "Megatron-Core lets sigmoid scores sum to 1")}
NAMES: Rules = (MOE_NORM, *corrected_router("mlp.gate.e_score_correction_bias"), *SHARED_EXPERTS)
BEST_OF_GROUP = 2
"""Experts whose scores make that of their group."""
REFUSED = {
    "`n_group` with another number than 2 experts of each chosen group": "Megatron-Core judges a group by "
    "so many of its experts as are chosen of it, the model by its best 2"
}


def expert_settings(config: Values) -> dict[str, Any]:
    """Return our settings of the experts of a layer; their groups are `group_settings`."""
    shared = config["n_shared_experts"] or 0  # null, in DeepSeek's own code, is none
    require_whole("n_shared_experts", shared, 0)
    scale = config["routed_scaling_factor"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
        raise InputError(f"routed_scaling_factor is {scale!r}; it must be a number above 0")
    return {
        "moe_shared_expert_intermediate_size": shared * config["moe_intermediate_size"] or None,
        "moe_router_topk_scaling_factor": None if scale == 1 else float(scale),
    }


def dense_first(config: Values) -> dict[str, Any]:
    """Return our setting of which layers have experts, where the first few have none."""
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    require_whole("first_k_dense_replace", dense, 0)
    if dense >= layers:
        raise InputError(
            f"first_k_dense_replace is {dense}, which leaves none of {layers} layers with experts; dense "
            "models are not known"
        )
    return {"moe_layer_freq": [int(layer >= dense) for layer in range(layers)] if dense else 1}


def group_settings(config: Values) -> dict[str, Any]:
    """Return our settings of the groups of experts of which a token goes to a few."""
    groups, chosen, experts = config["n_group"], config["topk_group"], config["n_routed_experts"]
    for name, value in (("n_group", groups), ("topk_group", chosen)):
        require_whole(name, value)
    if groups == chosen == 1:
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
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


def all_settings(config: Values) -> dict[str, Any]:
    """Return all our settings of the experts."""
    return {**expert_settings(config), **dense_first(config), **group_settings(config)}


def in_own_words(settings: Values) -> dict[str, Any]:
    """Say what `all_settings` reads from our `model` section."""
    frequency, expert = settings["moe_layer_freq"], settings["moe_ffn_hidden_size"]
    shared = settings.get("moe_shared_expert_intermediate_size") or 0
    return {
        "first_k_dense_replace": 0 if frequency == 1 else frequency.index(1),
        "n_shared_experts": shared // expert or None,
        "routed_scaling_factor": settings.get("moe_router_topk_scaling_factor") or 1.0,
        "n_group": settings.get("moe_router_num_groups") or 1,
        "topk_group": settings.get("moe_router_group_topk") or 1,
    }
