"""MiniMax-M2: queries and keys are normalized over all heads together, and a part of each head is rotated.

Source: `transformers`' model minimax_m2.
"""

from __future__ import annotations

from typing import Any

from megatron_dynmix.families.deepseek_moe import SIGMOID
from megatron_dynmix.families.dialect import Dialect, Only, Values, require_whole
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import (
    ATTENTION_RULES,
    EXPERTS,
    FULL_WIDTH_NORMS,
    FUSED,
    MOE_NORM,
    NameMap,
    corrected_router,
    gated,
)

SERVED = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
}
"""What the published config.json says, and vLLM and SGLang read; the model has no other."""


def in_common_words(config: Values) -> dict[str, Any]:
    """Say `rotary_dim`, the numbers of a head that are rotated, as the share of them that others say."""
    rotated, width = config.get("rotary_dim"), config["head_dim"]
    if rotated is None or "partial_rotary_factor" in config:
        return dict(config)
    for name, value in (("rotary_dim", rotated), ("head_dim", width)):
        require_whole(name, value)
    return {**config, "partial_rotary_factor": rotated / width}


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Say the same both ways, what another value is meant by if it is not said, and what servers ask for."""
    width, share = settings["kv_channels"], settings["rotary_percent"]
    return {
        **config,
        **SERVED,
        "head_dim": width,
        "rotary_dim": int(width * share),
        "partial_rotary_factor": share,
    }


MINIMAX_M2 = Family(
    title="MiniMax-M2",
    since="0.1.0",
    dialect=Dialect(
        architecture="MiniMaxM2ForCausalLM",
        names={"num_moe_experts": "num_local_experts"},
        fixed={"qk_layernorm": True, "qk_layernorm_full_width": True, **SIGMOID},
        must={"router_jitter_noise": Only(0.0, "routers add no noise to what they read")},
        partial_rotary=True,
        plain=in_common_words,
        published=in_own_words,
    ),
    names=NameMap(
        layer=(*ATTENTION_RULES, *FULL_WIDTH_NORMS),
        moe=(MOE_NORM,),
        separate=(
            *corrected_router(
                "block_sparse_moe.e_score_correction_bias", "block_sparse_moe.gate.weight", float32=False
            ),
            *gated(
                "block_sparse_moe.experts.{e}.*.weight", EXPERTS, "I", "experts", parts=("w1", "w3", "w2")
            ),
        ),
        fused=(*corrected_router("mlp.e_score_correction_bias", float32=False), *FUSED),
    ),
)
