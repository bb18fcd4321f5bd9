"""The families of Hugging Face models that are known: one file each, or one for those that share most."""

from megatron_dynmix.families import deepseek, llama_moe, mixtral, olmoe, qwen
from megatron_dynmix.families.family import Family

FAMILIES: dict[str, Family] = {
    "mixtral": mixtral.MIXTRAL,
    "qwen3_moe": qwen.QWEN3_MOE,
    "olmoe": olmoe.OLMOE,
    "qwen2_moe": qwen.QWEN2_MOE,
    "llama_moe": llama_moe.LLAMA_MOE,
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
}
"""The `model_type` of config.json -> its family. A model of our own is written as the first that can."""
