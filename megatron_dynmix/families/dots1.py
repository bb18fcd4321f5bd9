"""dots.llm1: attention of Qwen3, experts of DeepSeek-V3.

Source: `transformers`' model dots1.
"""

from __future__ import annotations

from typing import Any

from megatron_dynmix.families import deepseek_moe
from megatron_dynmix.families.dialect import UNBIASED, Dialect, Values
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import ATTENTION_RULES, DENSE, HEAD_NORMS, NameMap


def in_common_words(config: Values) -> dict[str, Any]:
    """Say of windows what the other families do; here layers from `max_window_layers` on have one."""
    layers, first = config["num_hidden_layers"], config["max_window_layers"]
    kinds = config["layer_types"]
    windowed = kinds is None and type(layers) is type(first) is int and layers > first
    if windowed or "sliding_attention" in (kinds or ()):
        return dict(config)
    return {**config, "sliding_window": None}


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Say what `deepseek_moe.all_settings` reads from our `model` section."""
    return {**config, **deepseek_moe.in_own_words(settings)}


DOTS1 = Family(
    title="dots.llm1",
    since="0.1.0",
    dialect=Dialect(
        architecture="Dots1ForCausalLM",
        names=deepseek_moe.EXPERTS,
        fixed={"qk_layernorm": True, **deepseek_moe.SIGMOID},
        must={"attention_bias": UNBIASED, **deepseek_moe.SUMS},
        plain=in_common_words,
        own=deepseek_moe.all_settings,
        published=in_own_words,
    ),
    names=NameMap(layer=(*ATTENTION_RULES, *HEAD_NORMS), moe=deepseek_moe.NAMES, dense=DENSE),
    refused=deepseek_moe.REFUSED,
)
