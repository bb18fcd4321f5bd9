"""LLaMA-MoE v1: LLaMA-2 7B with its feed-forward layers split into experts.

Source: the configuration and modelling code published with the model (pjlab-sys4nlp/llama-moe).
"""

from __future__ import annotations

from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.families.dialect import Dialect, Only, Values
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import ATTENTION_RULES, EXPERTS, MOE_NORM, NameMap, Rule, gated

ONLY: dict[str, Any] = {
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_noise_epsilon": 0.01,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "add_weight_norm": False,
    "attention_bias": False,
}
"""Settings that are computed with one value only, in `moe/mlp_router.py` and elsewhere; their default too."""

DEFAULTS: dict[str, Any] = {
    **ONLY,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "num_experts": 16,
    "num_selects": 4,
    "size_experts": None,
    "gate_add_noise": True,
    "score_scale_factor": 1.0,
}
"""What the published code takes for settings that config.json does not say."""


def in_common_words(config: Values) -> dict[str, Any]:
    """Say what `config` says of its experts as the other families do.

    `intermediate_size` is the width of LLaMA's feed-forward layer, which the experts share out.
    """
    said = dict(config)
    width, experts = config["intermediate_size"], config["num_experts"]
    if isinstance(width, int) and isinstance(experts, int) and experts > 0:
        each = config["size_experts"]
        equal = [[width // experts] * experts] * int(config.get("num_hidden_layers") or 0)
        if width % experts or (each is not None and each != equal):
            raise InputError(
                f"intermediate_size is {width} and size_experts is {each!s:.60}: only {experts} experts of "
                "one size, which share it out, can be run here"
            )
        said["intermediate_size"] = width // experts
    said["num_experts_per_tok"] = config["num_selects"]
    return said


def router_settings(config: Values) -> dict[str, Any]:
    """Return our settings of the router; the scores must have the same scale in every layer."""
    scale = config["score_scale_factor"]
    scales = set(scale) if isinstance(scale, list) else {scale}
    if len(scales) != 1 or not all(isinstance(item, int | float) and item > 0 for item in scales):
        raise InputError(
            f"score_scale_factor is {scale!s:.60}; only one positive number for all layers can be run here"
        )
    factor = float(scales.pop())
    return {
        "router_noise": "training" if config["gate_add_noise"] else None,
        "moe_router_topk_scaling_factor": None if factor == 1 else factor,
    }


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Undo `in_common_words`, and say what `router_settings` reads from our `model` section."""
    said = {name: value for name, value in config.items() if name != "num_experts_per_tok"}
    width, experts = config["intermediate_size"], config["num_experts"]
    if rope := said.get("rope_scaling"):  # its code knows `type` alone, as that of LLaMA did
        said["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_type"}
    return said | {
        "intermediate_size": width * experts,
        "size_experts": [[width] * experts] * config["num_hidden_layers"],
        "num_selects": config["num_experts_per_tok"],
        "score_scale_factor": settings["moe_router_topk_scaling_factor"] or 1.0,
        "gate_add_noise": settings["router_noise"] is not None,
    }


LLAMA_MOE = Family(
    title="LLaMA-MoE v1",
    since="0.1.0",
    dialect=Dialect(
        architecture="LlamaMoEForCausalLM",
        names={"num_moe_experts": "num_experts"},
        fixed={"moe_router_pre_softmax": False, "router_network": "mlp"},
        must={
            name: Only(value, "no published model has another, and none is built here")
            for name, value in ONLY.items()
        },
        defaults=DEFAULTS,
        plain=in_common_words,
        own=router_settings,
        published=in_own_words,
    ),
    names=NameMap(
        layer=ATTENTION_RULES,
        moe=(
            MOE_NORM,
            Rule("mlp.gate.gate_network.0.weight", "mlp.router.weight", "E H", "router"),
            Rule("mlp.gate.gate_network.2.weight", "mlp.router.output_weight", "E E", "router"),
            Rule(
                "mlp.gate.weight_noise.weight",
                "mlp.router.noise_weight",
                "E H",
                "router",
                when="router_noise",
            ),
        ),
        separate=gated(
            "mlp.calculator.experts.weight_*.{e}", EXPERTS, "I", "experts", parts=("gate", "up", "down")
        ),
        fused=(),
    ),
    refused={
        "`size_experts` of several sizes": "Megatron-Core's experts are all of one width",
        "`score_scale_factor` of several values": "there is one factor for all layers",
    },
)
