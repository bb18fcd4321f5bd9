"""Names of the tensors of each family of Hugging Face models, and what they are in a Megatron checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dynmix.convert.weight_map import (
    Layout,
    QueryKeyValue,
    Rule,
    Same,
    Stacked,
    WeightMap,
    moe_layers,
)
from megatron_dynmix.errors import InputError

Rules = tuple[Rule, ...]

COMPUTED = (".rotary_emb.inv_freq",)
"""Ends of the names of tensors that old folders hold though nothing in them was learnt."""

PREDICTION = "num_nextn_predict_layers"
"""Setting of config.json: layers for multi-token prediction, which follow the model's own."""

UNTIED = "untie_embeddings_and_output_weights"
EXPERTS = "mlp.experts.experts."
SHARED = "mlp.shared_experts."


@dataclass(frozen=True, kw_only=True)
class Family:
    """The tensors of a family's layers: those of every layer, and of each kind of layer.

    `separate` and `fused` are the two ways to write a layer's experts: a tensor for each, as published
    folders and transformers 4 have them, or all in one, as transformers 5 has them.
    """

    layer: Rules
    moe: Rules
    separate: Rules
    fused: Rules = ()
    dense: Rules = ()


OUTSIDE: Rules = (
    Same(
        hf="model.embed_tokens.weight",
        megatron="embedding.word_embeddings.weight",
        axes="V H",
        group="embedding",
    ),
    Same(hf="model.norm.weight", megatron="decoder.final_layernorm.weight", axes="H", group="norms"),
    Same(hf="lm_head.weight", megatron="output_layer.weight", axes="V H", group="output", when=UNTIED),
)
ATTENTION: Rules = (
    Same(
        hf="input_layernorm.weight",
        megatron="self_attention.linear_qkv.layer_norm_weight",
        axes="H",
        group="norms",
    ),
    QueryKeyValue(
        hf=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        megatron="self_attention.linear_qkv.weight",
        axes="H",
        group="attention",
    ),
    QueryKeyValue(
        hf=("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        megatron="self_attention.linear_qkv.bias",
        axes="",
        group="attention",
        when="add_qkv_bias",
    ),
    Same(
        hf="self_attn.o_proj.weight",
        megatron="self_attention.linear_proj.weight",
        axes="H Q",
        group="attention",
    ),
)
HEAD_NORMS: Rules = (
    Same(hf="self_attn.q_norm.weight", megatron="self_attention.q_layernorm.weight", axes="D", group="norms"),
    Same(hf="self_attn.k_norm.weight", megatron="self_attention.k_layernorm.weight", axes="D", group="norms"),
)
FULL_WIDTH_NORMS: Rules = (
    Same(
        hf="self_attn.q_norm.weight",
        megatron="self_attention.q_layernorm.norm.weight",
        axes="Q",
        group="norms",
    ),
    Same(
        hf="self_attn.k_norm.weight",
        megatron="self_attention.k_layernorm.norm.weight",
        axes="K",
        group="norms",
    ),
)
MOE_NORM = Same(
    hf="post_attention_layernorm.weight", megatron="pre_mlp_layernorm.weight", axes="H", group="norms"
)
DENSE: Rules = (
    Same(
        hf="post_attention_layernorm.weight",
        megatron="mlp.linear_fc1.layer_norm_weight",
        axes="H",
        group="norms",
    ),
    Stacked(
        hf=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        megatron="mlp.linear_fc1.weight",
        axes="F H",
        group="mlp",
    ),
    Same(hf="mlp.down_proj.weight", megatron="mlp.linear_fc2.weight", axes="H F", group="mlp"),
)
SHARED_EXPERT: Rules = (
    Stacked(
        hf=("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        megatron=SHARED + "linear_fc1.weight",
        axes="S H",
        group="shared experts",
    ),
    Same(
        hf="mlp.shared_expert.down_proj.weight",
        megatron=SHARED + "linear_fc2.weight",
        axes="H S",
        group="shared experts",
    ),
    Same(
        hf="mlp.shared_expert_gate.weight",
        megatron=SHARED + "gate_weight",
        axes="1 H",
        group="shared experts",
    ),
)


def router(name: str) -> Rule:
    """A router that is one linear layer."""
    return Same(hf=name, megatron="mlp.router.weight", axes="E H", group="router")


def experts(gate: str, up: str, down: str) -> Rules:
    """A tensor for each expert, of these names."""
    return (
        Stacked(hf=(gate, up), megatron=EXPERTS + "linear_fc1.weight", axes="I H", group="experts"),
        Same(hf=down, megatron=EXPERTS + "linear_fc2.weight", axes="H I", group="experts"),
    )


FUSED: Rules = (
    Same(
        hf="mlp.experts.gate_up_proj", megatron=EXPERTS + "linear_fc1.weight", axes="E J H", group="experts"
    ),
    Same(hf="mlp.experts.down_proj", megatron=EXPERTS + "linear_fc2.weight", axes="E H I", group="experts"),
)
SEPARATE: Rules = experts(
    "mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight"
)
ROUTER: Rules = (router("mlp.gate.weight"),)

MIXTRAL = Family(
    layer=ATTENTION,
    moe=(MOE_NORM,),
    separate=(
        router("block_sparse_moe.gate.weight"),
        *experts(
            "block_sparse_moe.experts.{e}.w1.weight",
            "block_sparse_moe.experts.{e}.w3.weight",
            "block_sparse_moe.experts.{e}.w2.weight",
        ),
    ),
    fused=(*ROUTER, *FUSED),
)
QWEN2_MOE = Family(
    layer=ATTENTION, moe=(MOE_NORM, *ROUTER, *SHARED_EXPERT), separate=SEPARATE, fused=FUSED, dense=DENSE
)
QWEN3_MOE = Family(
    layer=(*ATTENTION, *HEAD_NORMS), moe=(MOE_NORM, *ROUTER), separate=SEPARATE, fused=FUSED, dense=DENSE
)
OLMOE = Family(layer=(*ATTENTION, *FULL_WIDTH_NORMS), moe=(MOE_NORM, *ROUTER), separate=SEPARATE, fused=FUSED)
LLAMA_MOE = Family(
    layer=ATTENTION,
    moe=(
        MOE_NORM,
        router("mlp.gate.gate_network.0.weight"),
        Same(
            hf="mlp.gate.gate_network.2.weight",
            megatron="mlp.router.output_weight",
            axes="E E",
            group="router",
        ),
        Same(
            hf="mlp.gate.weight_noise.weight",
            megatron="mlp.router.noise_weight",
            axes="E H",
            group="router",
            when="router_noise",
        ),
    ),
    separate=experts(
        "mlp.calculator.experts.weight_gate.{e}",
        "mlp.calculator.experts.weight_up.{e}",
        "mlp.calculator.experts.weight_down.{e}",
    ),
)
LATENT = "self_attention.linear_"
DEEPSEEK = Family(
    layer=(
        Same(hf="input_layernorm.weight", megatron="input_layernorm.weight", axes="H", group="norms"),
        *(
            Same(hf=f"self_attn.{hf}.weight", megatron=LATENT + name, axes=axes, group=group, when=when)
            for hf, name, axes, group, when in (
                ("q_a_proj", "q_down_proj.weight", "A H", "attention", "q_lora_rank"),
                ("q_a_layernorm", "q_up_proj.layer_norm_weight", "A", "norms", "q_lora_rank"),
                ("q_b_proj", "q_up_proj.weight", "T A", "attention", "q_lora_rank"),
                ("kv_a_proj_with_mqa", "kv_down_proj.weight", "M H", "attention", None),
                ("kv_a_layernorm", "kv_up_proj.layer_norm_weight", "C", "norms", None),
                ("kv_b_proj", "kv_up_proj.weight", "P C", "attention", None),
                ("o_proj", "proj.weight", "H O", "attention", None),
            )
        ),
        Same(
            hf="self_attn.q_proj.weight",
            megatron=LATENT + "q_proj.weight",
            axes="T H",
            group="attention",
            unless="q_lora_rank",
        ),
    ),
    moe=(
        MOE_NORM,
        *ROUTER,
        Same(
            hf="mlp.gate.e_score_correction_bias",
            megatron="mlp.router.expert_bias",
            axes="E",
            group="router",
            when="moe_router_enable_expert_bias",
        ),
        Stacked(
            hf=("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
            megatron=SHARED + "linear_fc1.weight",
            axes="S H",
            group="shared experts",
            when="moe_shared_expert_intermediate_size",
        ),
        Same(
            hf="mlp.shared_experts.down_proj.weight",
            megatron=SHARED + "linear_fc2.weight",
            axes="H S",
            group="shared experts",
            when="moe_shared_expert_intermediate_size",
        ),
    ),
    separate=SEPARATE,
    fused=FUSED,
    dense=DENSE,
)

FAMILIES: Mapping[str, Family] = {
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "llama_moe": LLAMA_MOE,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
}
"""The `model_type` of a config.json -> its family."""


def prediction_layers(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of tensors for multi-token prediction begin with; none but DeepSeek-V3 has any.

    They serve to decode faster and are no part of the model, for `transformers` neither.
    """
    count = hf_config.get(PREDICTION) or 0 if hf_config.get("model_type") == "deepseek_v3" else 0
    first = hf_config.get("num_hidden_layers", 0)
    return tuple(f"model.layers.{layer}." for layer in range(first, first + count))


def weight_map(
    settings: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    *,
    fused_experts: bool = False,
    padded_vocab: int | None = None,
) -> WeightMap:
    """Where every number of a model is, in both worlds.

    Args:
        settings: the `model` section, flat: our fields and those of `TransformerConfig`.
        hf_config: what config.json holds; its `model_type` says which family.
        fused_experts: whether the folder has a layer's experts in one tensor.
        padded_vocab: rows of the embedding in the checkpoint; the vocabulary if not given.

    Raises:
        InputError: a family that is not known, or that has no fused experts.

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
    layout = Layout(settings)
    layout.add_outside(OUTSIDE)
    for index, is_moe in enumerate(moe_layers(settings)):
        kind = (
            (*family.moe, *(family.fused if fused_experts else family.separate)) if is_moe else family.dense
        )
        assert is_moe or family.dense, f"a dense layer in {hf_config['model_type']}"
        layout.add_layer(index, (*family.layer, *kind))
    return layout.weight_map(padded_vocab)
