"""Qwen2-MoE and Qwen3-MoE.

Source: `transformers`' models qwen2_moe and qwen3_moe.
"""

from __future__ import annotations

from megatron_dynmix.families.dialect import PRE_SOFTMAX, QWEN_EXPERTS, UNBIASED, Dialect
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import (
    ATTENTION_RULES,
    DENSE,
    HEAD_NORMS,
    MOE_NORM,
    ROUTER,
    SHARED,
    NameMap,
    Rule,
    gated,
)

QWEN2_MOE = Family(
    title="Qwen1.5-MoE, Qwen2-57B-A14B",
    since="0.1.0",
    dialect=Dialect(
        architecture="Qwen2MoeForCausalLM",
        names={
            **QWEN_EXPERTS,
            "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        },
        switches={**PRE_SOFTMAX, "add_qkv_bias": ("qkv_bias", False)},
        fixed={"moe_shared_expert_gate": True},
        mixed=True,
    ),
    names=NameMap(
        layer=ATTENTION_RULES,
        moe=(
            MOE_NORM,
            ROUTER,
            *gated("mlp.shared_expert.*.weight", SHARED, "S", "shared experts"),
            Rule("mlp.shared_expert_gate.weight", SHARED + "gate_weight", "1 H", "shared experts"),
        ),
        dense=DENSE,
    ),
)
QWEN3_MOE = Family(
    title="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B",
    since="0.1.0",
    dialect=Dialect(
        architecture="Qwen3MoeForCausalLM",
        names=QWEN_EXPERTS,
        switches=PRE_SOFTMAX,
        fixed={"qk_layernorm": True},
        must={"attention_bias": UNBIASED},
        mixed=True,
    ),
    names=NameMap(layer=(*ATTENTION_RULES, *HEAD_NORMS), moe=(MOE_NORM, ROUTER), dense=DENSE),
)
