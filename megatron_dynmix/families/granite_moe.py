"""Granite's mixtures of experts: embedding, residual branches, scores and logits are scaled by settings.

Source: `transformers`' models granitemoe and granitemoeshared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.families.dialect import UNBIASED, Dialect, Values
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import ATTENTION_RULES, EXPERTS, MOE_NORM, SHARED, NameMap, Rule, Rules

SCALES = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
"""Settings of the same name here and there."""
SCORES = "attention_multiplier"
"""What the products of queries and keys are multiplied by: our `softmax_scale`."""


def _usual(heads_width: int) -> float:
    """Return the scale of attention scores where nothing is said of it."""
    return float(heads_width**-0.5)


def own_settings(config: Values) -> dict[str, Any]:
    """Return our settings of what is scaled."""
    for name in (*SCALES, SCORES):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{name} is {value!r}; it must be a number above 0")
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    scale = float(config[SCORES])
    return {
        **{name: float(config[name]) for name in SCALES},
        "softmax_scale": None if scale == _usual(width) else scale,
    }


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Say what `own_settings` reads from our `model` section."""
    scale = settings["softmax_scale"]
    return {
        **config,
        **{name: settings[name] for name in SCALES},
        SCORES: _usual(settings["kv_channels"]) if scale is None else scale,
    }


def _moe(router: str, first: str, second: str) -> Rules:
    """Return the rules of routed experts, all of a layer in one tensor however they are written."""
    return tuple(
        Rule(f"block_sparse_moe.{name}", *rest)
        for name, *rest in (
            (router, "mlp.router.weight", "E H", "router"),
            (first, EXPERTS + "linear_fc1.weight", "E J H", "experts"),
            (second, EXPERTS + "linear_fc2.weight", "E H I", "experts"),
        )
    )


GRANITE_MOE = Family(
    title="Granite 3.0 and 3.1 1B-A400M, 3B-A800M; PowerMoE-3B",
    since="0.1.0",
    dialect=Dialect(
        architecture="GraniteMoeForCausalLM",
        names={"num_moe_experts": "num_local_experts"},
        fixed={"moe_router_pre_softmax": False},
        must={"attention_bias": UNBIASED},
        own=own_settings,
        published=in_own_words,
    ),
    names=NameMap(
        layer=ATTENTION_RULES,
        moe=(MOE_NORM,),
        separate=_moe("router.layer.weight", "input_linear.weight", "output_linear.weight"),
        fused=_moe("router.weight", "experts.gate_up_proj", "experts.down_proj"),
    ),
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    title="MoE-7B-1B-active-shared-experts",
    dialect=replace(
        GRANITE_MOE.dialect,
        architecture="GraniteMoeSharedForCausalLM",
        names={
            **GRANITE_MOE.dialect.names,
            "moe_shared_expert_intermediate_size": "shared_intermediate_size",
        },
    ),
    names=replace(
        GRANITE_MOE.names,
        moe=(
            MOE_NORM,
            Rule("shared_mlp.input_linear.weight", SHARED + "linear_fc1.weight", "U H", "shared experts"),
            Rule("shared_mlp.output_linear.weight", SHARED + "linear_fc2.weight", "H S", "shared experts"),
        ),
    ),
)
