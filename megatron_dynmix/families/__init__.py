"""The families of Hugging Face models that are known: one file each, or one for those that share most."""

from megatron_dynmix.families import (
    deepseek,
    dots1,
    glm,
    gpt_oss,
    granite_moe,
    llama_moe,
    minimax,
    mixtral,
    moduleformer,
    olmoe,
    qwen,
)
from megatron_dynmix.families.family import Family

FAMILIES: dict[str, Family] = {
    "mixtral": mixtral.MIXTRAL,
    "qwen3_moe": qwen.QWEN3_MOE,
    "olmoe": olmoe.OLMOE,
    "qwen2_moe": qwen.QWEN2_MOE,
    "llama_moe": llama_moe.LLAMA_MOE,
    "moduleformer": moduleformer.MODULEFORMER,
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
    "kimi_k2": deepseek.KIMI_K2,
    "dots1": dots1.DOTS1,
    "glm4_moe": glm.GLM4_MOE,
    "glm4_moe_lite": glm.GLM4_MOE_LITE,
    "minimax_m2": minimax.MINIMAX_M2,
    "gpt_oss": gpt_oss.GPT_OSS,
    "granitemoe": granite_moe.GRANITE_MOE,
    "granitemoeshared": granite_moe.GRANITE_MOE_SHARED,
}
"""The `model_type` of config.json -> its family. A model of our own is written as the first that can."""


def known_as(model_type: str | None) -> str | None:
    """Return the `model_type` under which `transformers` has the models of another."""
    family = FAMILIES.get(str(model_type))
    return family.dialect.alias or model_type if family is not None else model_type
