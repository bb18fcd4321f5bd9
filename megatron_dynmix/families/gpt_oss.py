"""gpt-oss: sinks beside the keys, windows in every other layer, biases everywhere, YaRN.

Source: `transformers`' model gpt_oss; Megatron-Core's `DotProductAttention` and `MLP`.
"""

from __future__ import annotations

from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.families.dialect import Dialect, Only, Values, require_whole
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import (
    ATTENTION,
    ATTENTION_RULES,
    EXPERTS,
    FUSED,
    MOE_NORM,
    NameMap,
    Rule,
)

WINDOWED, WHOLE = "sliding_attention", "full_attention"
USUAL_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What `transformers` takes where config.json says nothing of the rotary embedding but its base."""


def in_common_words(config: Values) -> dict[str, Any]:
    """Say how positions are stretched, also where `config` does not."""
    said = dict(config)
    if not config.get("rope_scaling") and not config.get("rope_parameters"):
        said["rope_scaling"] = USUAL_ROPE
    return said


def own_settings(config: Values) -> dict[str, Any]:
    """Return our settings of windows and of the activation's limit.

    A window counts the token itself, Megatron-Core's `window_size` those before it.
    """
    limit, layers = config["swiglu_limit"], config["num_hidden_layers"]
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0:
        raise InputError(f"swiglu_limit is {limit!r}; it must be a number above 0")
    kinds = config["layer_types"] or [(WINDOWED, WHOLE)[layer % 2] for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not {*kinds} <= {WINDOWED, WHOLE}:
        raise InputError(
            f"layer_types is {kinds!s:.60}; it must say {WINDOWED} or {WHOLE} for each of {layers} layers"
        )
    settings = {"activation_func_clamp_value": float(limit)}
    if WINDOWED not in kinds:
        return {**settings, "window_size": None, "window_attn_skip_freq": None}
    require_whole("sliding_window", config["sliding_window"])
    return {
        **settings,
        "window_size": [config["sliding_window"] - 1, 0],
        "window_attn_skip_freq": [int(kind == WINDOWED) for kind in kinds],
    }


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Undo `in_common_words`, and say what `own_settings` reads from our `model` section."""
    window = settings["window_size"]
    windowed = settings["window_attn_skip_freq"] if window else [0] * settings["num_layers"]
    return {
        "rope_scaling": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        **config,
        "head_dim": settings["kv_channels"],
        "sliding_window": None if window is None else window[0] + 1,
        "layer_types": [WINDOWED if looks else WHOLE for looks in windowed],
        "swiglu_limit": settings["activation_func_clamp_value"],
    }


GPT_OSS = Family(
    title="gpt-oss 20b, 120b",
    since="0.1.0",
    dialect=Dialect(
        architecture="GptOssForCausalLM",
        names={"num_moe_experts": "num_local_experts"},
        fixed={
            "add_bias_linear": True,
            "add_qkv_bias": True,
            "softmax_type": "learnable",
            "activation": "quick-gelu",
            "glu_linear_offset": 1.0,
            "moe_router_pre_softmax": False,
        },
        must={
            "attention_bias": Only(True, "Megatron-Core gives biases to attention and experts together"),
            "swiglu_alpha": Only(1.702, "quick GELU has no other gain"),
        },
        windows=True,
        plain=in_common_words,
        own=own_settings,
        published=in_own_words,
    ),
    names=NameMap(
        layer=(
            *ATTENTION_RULES,
            Rule("self_attn.o_proj.bias", ATTENTION + "proj.bias", "H", "attention"),
            Rule("self_attn.sinks", "self_attention.core_attention.softmax_offset", "N", "attention"),
        ),
        moe=(
            MOE_NORM,
            Rule("mlp.router.weight", "mlp.router.weight", "E H", "router"),
            Rule("mlp.router.bias", "mlp.router.bias", "E", "router"),
        ),
        separate=(),
        fused=(
            *FUSED,
            Rule("mlp.experts.gate_up_proj_bias", EXPERTS + "linear_fc1.bias", "E J", "experts"),
            Rule("mlp.experts.down_proj_bias", EXPERTS + "linear_fc2.bias", "E H", "experts"),
        ),
        interleaved=True,
    ),
    refused={
        "`--expert-tensor-parallel-size` above 1": "Megatron-Core takes experts with biases whole only",
        "windows with `--context-parallel-size` above 1": "a mask knows no positions there",
    },
)
