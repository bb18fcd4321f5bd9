"""Mixtral.

Source: `transformers`' model mixtral.
"""

from __future__ import annotations

from megatron_dynmix.families.dialect import UNBIASED, Dialect, Only
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import (
    ATTENTION_RULES,
    EXPERTS,
    FUSED,
    MOE_NORM,
    ROUTER,
    NameMap,
    Rule,
    gated,
)

MIXTRAL = Family(
    title="Mixtral 8x7B, 8x22B",
    since="0.1.0",
    dialect=Dialect(
        architecture="MixtralForCausalLM",
        names={"num_moe_experts": "num_local_experts"},
        fixed={"moe_router_pre_softmax": False},
        must={
            "router_jitter_noise": Only(0.0, "routers add no noise to what they read"),
            "attention_bias": UNBIASED,
        },
    ),
    names=NameMap(
        layer=ATTENTION_RULES,
        moe=(MOE_NORM,),
        separate=(
            Rule("block_sparse_moe.gate.weight", "mlp.router.weight", "E H", "router"),
            *gated(
                "block_sparse_moe.experts.{e}.*.weight", EXPERTS, "I", "experts", parts=("w1", "w3", "w2")
            ),
        ),
        fused=(ROUTER, *FUSED),
    ),
)
