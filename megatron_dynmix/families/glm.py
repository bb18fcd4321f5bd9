"""GLM-4.5, 4.6, 4.7 and their smaller kin: attention of GLM or of DeepSeek, experts of DeepSeek-V3.

Source: `transformers`' models glm4_moe and glm4_moe_lite.
"""

from __future__ import annotations

from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.families import deepseek_moe, latent
from megatron_dynmix.families.dialect import Dialect, Values, require_whole
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import ATTENTION_RULES, DENSE, HEAD_NORMS, LATENT_ATTENTION, NameMap

KINDS = ("dense", "sparse")
"""Words of `mlp_layer_types`."""


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Say what `deepseek_moe.all_settings` reads, and what another value is meant by if it is not said."""
    said = {
        **config,
        **deepseek_moe.in_own_words(settings),
        "head_dim": settings["kv_channels"],
        "partial_rotary_factor": settings["rotary_percent"],
    }
    return said | {"n_shared_experts": said["n_shared_experts"] or 0}


def lite_in_common_words(config: Values) -> dict[str, Any]:
    """Say what `config` says as the other families do."""
    require_whole("num_key_value_heads", config["num_key_value_heads"])
    return latent.in_common_words(config)


def lite_settings(config: Values) -> dict[str, Any]:
    """Return our settings of latent attention and experts."""
    return {
        **latent.attention_settings(config),
        **deepseek_moe.expert_settings(config),
        **deepseek_moe.group_settings(config),
        "moe_layer_freq": _moe_layer_freq(config["mlp_layer_types"], config["num_hidden_layers"]),
    }


def _moe_layer_freq(kinds: Any, layers: int) -> int | list[int]:
    if kinds is None:
        kinds = [KINDS[layer > 0] for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(KINDS):
        raise InputError(
            f"mlp_layer_types is {kinds!s:.60}; it must be a list of {' or '.join(KINDS)} for each of "
            f"{layers} layers"
        )
    if "sparse" not in kinds:
        raise InputError("mlp_layer_types leaves no layer with experts; dense models are not known")
    return 1 if "dense" not in kinds else [KINDS.index(kind) for kind in kinds]


def lite_in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Say what `lite_settings` reads from our `model` section."""
    said = {**latent.in_own_words(config, settings), **deepseek_moe.in_own_words(settings)}
    layers, frequency = settings["num_layers"], settings["moe_layer_freq"]
    pattern = [1] * layers if frequency == 1 else frequency
    return said | {
        "topk_method": "noaux_tc",  # like `first_k_dense_replace` for vLLM and SGLang
        "n_shared_experts": said["n_shared_experts"] or 0,
        "mlp_layer_types": [KINDS[is_moe] for is_moe in pattern],
    }


GLM4_MOE = Family(
    title="GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
    since="0.1.0",
    dialect=Dialect(
        architecture="Glm4MoeForCausalLM",
        names=deepseek_moe.EXPERTS,
        switches={"qk_layernorm": ("use_qk_norm", False), "add_qkv_bias": ("attention_bias", False)},
        fixed=deepseek_moe.SIGMOID,
        must=deepseek_moe.SUMS,
        partial_rotary=True,
        own=deepseek_moe.all_settings,
        published=in_own_words,
    ),
    names=NameMap(
        layer=(*ATTENTION_RULES, *HEAD_NORMS), moe=deepseek_moe.NAMES, dense=DENSE, predicting=True
    ),
    refused=deepseek_moe.REFUSED,
)
GLM4_MOE_LITE = Family(
    title="GLM-4.7-Flash",
    since="0.1.0",
    dialect=Dialect(
        architecture="Glm4MoeLiteForCausalLM",
        names=deepseek_moe.EXPERTS,
        fixed={**latent.FIXED, **deepseek_moe.SIGMOID},
        must={**latent.MUST, **deepseek_moe.SUMS},
        plain=lite_in_common_words,
        own=lite_settings,
        published=lite_in_own_words,
    ),
    names=NameMap(layer=LATENT_ATTENTION, moe=deepseek_moe.NAMES, dense=DENSE, predicting=True),
    refused=deepseek_moe.REFUSED,
)
