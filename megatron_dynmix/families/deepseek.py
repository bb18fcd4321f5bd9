"""DeepSeek-V2 and V3, and Kimi-K2, which is a V3 under another `model_type`.

Source: `transformers`' models deepseek_v2 and deepseek_v3, and the code published with Kimi-K2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_dynmix.families import deepseek_moe, latent
from megatron_dynmix.families.dialect import Dialect, Only, Values
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import DENSE, LATENT_ATTENTION, MOE_NORM, ROUTER, SHARED_EXPERTS, NameMap

DENSE_FIRST = {"moe_layer_freq": Only(1, "only the first layers can be dense")}


def v2_settings(config: Values) -> dict[str, Any]:
    """Return our settings of latent attention, and of experts without groups."""
    return {
        **latent.attention_settings(config),
        **deepseek_moe.expert_settings(config),
        **deepseek_moe.dense_first(config),
    }


def v3_settings(config: Values) -> dict[str, Any]:
    """Return our settings of latent attention and experts."""
    return {**latent.attention_settings(config), **deepseek_moe.all_settings(config)}


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Say all of that from our `model` section."""
    return {**latent.in_own_words(config, settings), **deepseek_moe.in_own_words(settings)}


V2 = Family(
    title="DeepSeek-V2-Lite",
    since="0.1.0",
    dialect=Dialect(
        architecture="DeepseekV2ForCausalLM",
        names=deepseek_moe.EXPERTS,
        fixed={**latent.FIXED, "moe_router_pre_softmax": True},
        must={
            **latent.MUST,
            **DENSE_FIRST,
            "mlp_bias": Only(False, "linear layers have no biases here"),
            "scoring_func": Only("softmax", "the model has no other"),
            "topk_method": Only(
                "greedy", "V2 judges a group by its best expert, Megatron-Core by the sum of several"
            ),
            "norm_topk_prob": Only(False, "`transformers` and the published code differ in what true means"),
        },
        plain=latent.in_common_words,
        own=v2_settings,
        published=in_own_words,
    ),
    names=NameMap(layer=LATENT_ATTENTION, moe=(MOE_NORM, ROUTER, *SHARED_EXPERTS), dense=DENSE),
)
V3 = Family(
    title="DeepSeek-V3, Moonlight-16B-A3B",
    since="0.1.0",
    dialect=Dialect(
        architecture="DeepseekV3ForCausalLM",
        names=deepseek_moe.EXPERTS,
        fixed={**latent.FIXED, **deepseek_moe.SIGMOID},
        must={
            **latent.MUST,
            **DENSE_FIRST,
            **deepseek_moe.SUMS,
            "scoring_func": Only("sigmoid", "the model has no other"),
            "topk_method": Only("noaux_tc", "the model has no other"),
        },
        plain=latent.in_common_words,
        own=v3_settings,
        published=in_own_words,
    ),
    names=NameMap(layer=LATENT_ATTENTION, moe=deepseek_moe.NAMES, dense=DENSE, predicting=True),
    refused=deepseek_moe.REFUSED,
)
KIMI_K2 = replace(V3, title="Kimi-K2", dialect=replace(V3.dialect, alias="deepseek_v3"))
