"""Names of the tensors of each family of Hugging Face models, and what they are in a Megatron checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron_dynmix.config.megatron_fields import moe_layers
from megatron_dynmix.convert.weight_map import EMBEDDING, QueryKeyValue, Rule, WeightMap, lay_out
from megatron_dynmix.errors import InputError

Rules = tuple[Rule, ...]
UNTIED = "untie_embeddings_and_output_weights"
BIASED = "moe_router_enable_expert_bias"

COMPUTED = (".rotary_emb.inv_freq",)
"""Ends of the names of tensors that old folders hold though nothing in them was learned."""

PREDICTION = "num_nextn_predict_layers"
"""Setting of config.json: layers for multi-token prediction, which follow the model's own."""

ATTENTION = "self_attention.linear_"
EXPERTS = "mlp.experts.experts."
SHARED = "mlp.shared_experts."


def gated(
    names: str,
    megatron: str,
    inner: str,
    group: str,
    parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
    when: str | None = None,
) -> Rules:
    """Return the rules of a gated MLP: `names` hold `*` where each of them has its part."""
    gate, up, down = (names.replace("*", part) for part in parts)
    return (
        Rule((gate, up), megatron + "linear_fc1.weight", f"{inner} H", group, when=when),
        Rule(down, megatron + "linear_fc2.weight", f"H {inner}", group, when=when),
    )


OUTSIDE: Rules = (
    Rule("model.embed_tokens.weight", EMBEDDING, "V H", "embedding"),
    Rule("model.norm.weight", "decoder.final_layernorm.weight", "H", "norms"),
    Rule("lm_head.weight", "output_layer.weight", "V H", "output", when=UNTIED),
)
QKV_WEIGHTS, QKV_BIASES = (
    tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv") for kind in ("weight", "bias")
)
ATTENTION_RULES: Rules = (
    Rule("input_layernorm.weight", ATTENTION + "qkv.layer_norm_weight", "H", "norms"),
    QueryKeyValue(QKV_WEIGHTS, ATTENTION + "qkv.weight", "H", "attention"),
    QueryKeyValue(QKV_BIASES, ATTENTION + "qkv.bias", "", "attention", when="add_qkv_bias"),
    Rule("self_attn.o_proj.weight", ATTENTION + "proj.weight", "H Q", "attention"),
)
HEAD_NORMS: Rules = (
    Rule("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", "D", "norms"),
    Rule("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", "D", "norms"),
)
FULL_WIDTH_NORMS: Rules = (
    Rule("self_attn.q_norm.weight", "self_attention.q_layernorm.norm.weight", "Q", "norms"),
    Rule("self_attn.k_norm.weight", "self_attention.k_layernorm.norm.weight", "K", "norms"),
)
DENSE: Rules = (
    Rule("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "H", "norms"),
    *gated("mlp.*.weight", "mlp.", "F", "mlp"),
)
MOE_NORM = Rule("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "H", "norms")
ROUTER = Rule("mlp.gate.weight", "mlp.router.weight", "E H", "router")
SEPARATE = gated("mlp.experts.{e}.*.weight", EXPERTS, "I", "experts")
FUSED: Rules = (
    Rule("mlp.experts.gate_up_proj", EXPERTS + "linear_fc1.weight", "E J H", "experts"),
    Rule("mlp.experts.down_proj", EXPERTS + "linear_fc2.weight", "E H I", "experts"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The tensors of a family's layers: those of every layer, and of each kind of layer.

    `separate` and `fused` are the two ways to write a layer's experts: a tensor for each, as published
    folders and transformers 4 have them, or all in one, as transformers 5 has them.
    """

    layer: Rules
    moe: Rules = ()
    separate: Rules = SEPARATE
    fused: Rules = FUSED
    dense: Rules = ()


DEEPSEEK = Family(
    layer=(
        Rule("input_layernorm.weight", "input_layernorm.weight", "H", "norms"),
        *(
            Rule(f"self_attn.{hf}.weight", ATTENTION + name, axes, group, when="q_lora_rank")
            for hf, name, axes, group in (
                ("q_a_proj", "q_down_proj.weight", "A H", "attention"),
                ("q_a_layernorm", "q_up_proj.layer_norm_weight", "A", "norms"),
                ("q_b_proj", "q_up_proj.weight", "T A", "attention"),
            )
        ),
        Rule("self_attn.kv_a_proj_with_mqa.weight", ATTENTION + "kv_down_proj.weight", "M H", "attention"),
        Rule("self_attn.kv_a_layernorm.weight", ATTENTION + "kv_up_proj.layer_norm_weight", "C", "norms"),
        Rule("self_attn.kv_b_proj.weight", ATTENTION + "kv_up_proj.weight", "P C", "attention"),
        Rule("self_attn.o_proj.weight", ATTENTION + "proj.weight", "H O", "attention"),
        Rule(
            "self_attn.q_proj.weight", ATTENTION + "q_proj.weight", "T H", "attention", unless="q_lora_rank"
        ),
    ),
    moe=(
        ROUTER,
        Rule(
            "mlp.gate.e_score_correction_bias",
            "mlp.router.expert_bias",
            "E",
            "router",
            when=BIASED,
            float32=True,
        ),
        *gated(
            "mlp.shared_experts.*.weight",
            SHARED,
            "S",
            "shared experts",
            when="moe_shared_expert_intermediate_size",
        ),
    ),
    dense=DENSE,
)

FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(
        layer=ATTENTION_RULES,
        separate=(
            Rule("block_sparse_moe.gate.weight", "mlp.router.weight", "E H", "router"),
            *gated(
                "block_sparse_moe.experts.{e}.*.weight", EXPERTS, "I", "experts", parts=("w1", "w3", "w2")
            ),
        ),
        fused=(ROUTER, *FUSED),
    ),
    "qwen2_moe": Family(
        layer=ATTENTION_RULES,
        moe=(
            ROUTER,
            *gated("mlp.shared_expert.*.weight", SHARED, "S", "shared experts"),
            Rule("mlp.shared_expert_gate.weight", SHARED + "gate_weight", "1 H", "shared experts"),
        ),
        dense=DENSE,
    ),
    "qwen3_moe": Family(layer=(*ATTENTION_RULES, *HEAD_NORMS), moe=(ROUTER,), dense=DENSE),
    "olmoe": Family(layer=(*ATTENTION_RULES, *FULL_WIDTH_NORMS), moe=(ROUTER,)),
    "llama_moe": Family(
        layer=ATTENTION_RULES,
        moe=(
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
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
}
"""The `model_type` of a config.json -> its family."""


def prediction_layers(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the names of tensors for multi-token prediction begin with; only DeepSeek-V3 has any.

    They serve to decode faster and are no part of the model, for `transformers` neither.
    """
    count = hf_config.get(PREDICTION) or 0 if hf_config.get("model_type") == "deepseek_v3" else 0
    first = hf_config.get("num_hidden_layers", 0)
    return tuple(f"model.layers.{layer}." for layer in range(first, first + count))


def prediction_text(names: Sequence[str]) -> str:
    """Say which tensors of multi-token prediction stay behind, and what follows."""
    layers = sorted({".".join(name.split(".")[:3]) for name in names})
    return (
        f"{len(names)} tensors of multi-token prediction ({', '.join(f'{layer}.*' for layer in layers)}): "
        "they are not trained, and what is exported is without them"
    )


def weight_map(
    settings: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    *,
    fused_experts: bool = False,
    padded_vocab: int | None = None,
) -> WeightMap:
    """Say where every number of a model, with these settings of the `model` section, is in both worlds.

    `fused_experts` says whether the folder has a layer's experts in one tensor, `padded_vocab` how many rows
    the embedding has in the checkpoint: by default, those of the vocabulary.
    """
    family = FAMILIES.get(str(hf_config.get("model_type")))
    if family is None:
        raise InputError(
            f"model_type is {hf_config.get('model_type')!r}, whose tensors are not known; "
            f"known are {', '.join(FAMILIES)}"
        )
    if fused_experts and not family.fused:
        raise InputError(
            f"{hf_config['model_type']} has no layout with all experts in one tensor; write a tensor for each"
        )
    settings = {UNTIED: True, **settings}
    moe = (MOE_NORM, *family.moe, *(family.fused if fused_experts else family.separate))
    rules: list[tuple[int | None, Rule]] = [(None, rule) for rule in OUTSIDE]
    routed = moe_layers(SimpleNamespace(**{"moe_layer_freq": 1, **settings}))
    for layer in range(settings["num_layers"]):
        assert layer in routed or family.dense, f"a dense layer in {hf_config['model_type']}"
        rules += [(layer, rule) for rule in (*family.layer, *(moe if layer in routed else family.dense))]
    return lay_out(settings, rules, padded_vocab)
