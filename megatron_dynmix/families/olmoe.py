"""OLMoE: queries and keys are normalized over all heads together.

Source: `transformers`' model olmoe.
"""

from __future__ import annotations

from megatron_dynmix.families.dialect import PRE_SOFTMAX, UNBIASED, Dialect, Only
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import ATTENTION_RULES, FULL_WIDTH_NORMS, MOE_NORM, ROUTER, NameMap

OLMOE = Family(
    title="OLMoE",
    since="0.1.0",
    dialect=Dialect(
        architecture="OlmoeForCausalLM",
        names={"num_moe_experts": "num_experts"},
        switches=PRE_SOFTMAX,
        fixed={"qk_layernorm": True, "qk_layernorm_full_width": True},
        must={
            "attention_bias": UNBIASED,
            "clip_qkv": Only(None, "Megatron-Core clips no queries, keys and values"),
        },
    ),
    names=NameMap(layer=(*ATTENTION_RULES, *FULL_WIDTH_NORMS), moe=(MOE_NORM, ROUTER)),
)
