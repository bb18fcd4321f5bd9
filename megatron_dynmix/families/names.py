"""What a name map is: the tensors of a family of Hugging Face models, and what they are in a checkpoint.

A rule says it of the tensors of one layer, and which boxes of numbers both have in common;
`convert/model_map.py` makes the map of a whole model of them. Most families are made of the rules that stand
at the end of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

Shape = tuple[int, ...]
Sizes = Mapping[str, int]
"""Letter -> size, as `convert/model_map.py` has them."""

UNTIED = "untie_embeddings_and_output_weights"
BIASED = "moe_router_enable_expert_bias"
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


class Piece(NamedTuple):
    """A block within one layer, and one expert if the rule is for each of them."""

    hf: str
    hf_shape: Shape
    hf_offset: Shape
    megatron_offset: Shape
    shape: Shape
    transposed: bool = False


@dataclass(frozen=True)
class Rule:
    """Hugging Face tensors of equal shape that lie under one another in a Megatron tensor; one may be alone.

    `{e}` in a name stands for the number of an expert: the rule then holds for each of them.
    """

    hf: str | tuple[str, ...]
    megatron: str
    axes: str
    """Axes of each Hugging Face tensor as letters of `sizes_of`, such as `I H`."""
    group: str
    """Kind of the Megatron tensor in a verdict."""
    _: KW_ONLY
    when: str | None = None
    """Setting of the model without which neither side has the tensor."""
    unless: str | None = None
    """Setting with which neither side has it."""
    float32: bool = False
    """Whether it stays float32 where a model is in another type: `_keep_in_fp32_modules_strict` there."""

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors, in the order of their rows."""
        return (self.hf,) if isinstance(self.hf, str) else self.hf

    def pieces(self, sizes: Sizes) -> list[Piece]:
        """Return the blocks, in the order of their rows in the Megatron tensor."""
        shape = shape_of(self.axes, sizes)
        first, *rest = (0,) * len(shape)
        return [
            Piece(name, shape, (first, *rest), (number * shape[0], *rest), shape)
            for number, name in enumerate(self.names)
        ]


class QueryKeyValue(Rule):
    """Queries, keys and values in one tensor: for each KV group its query heads, its key, its value.

    `axes` is what follows the rows: `H` for weights, nothing for biases.
    """

    def pieces(self, sizes: Sizes) -> list[Piece]:
        """Return three blocks for each KV group."""
        rest = shape_of(self.axes, sizes)
        zeros = (0,) * len(rest)
        rows = (sizes["Q"] // sizes["G"], sizes["D"], sizes["D"])
        found = []
        for group in range(sizes["G"]):
            start = group * sum(rows)
            for name, count in zip(self.names, rows, strict=True):
                whole = (count * sizes["G"], *rest)
                found.append(Piece(name, whole, (group * count, *zeros), (start, *zeros), (count, *rest)))
                start += count
        return found


class Transposed(Rule):
    """A tensor whose last two axes are the other way round in the Megatron tensor."""

    def pieces(self, sizes: Sizes) -> list[Piece]:
        """Return one block, the whole tensor."""
        shape = shape_of(self.axes, sizes)
        start = (0,) * len(shape)
        return [Piece(self.names[0], shape, start, start, swapped(shape), transposed=True)]


def swapped(axes: Shape) -> Shape:
    """Return the last two the other way round."""
    return (*axes[:-2], axes[-1], axes[-2])


def shape_of(axes: str, sizes: Sizes) -> Shape:
    """Return the shape that letters stand for."""
    return tuple(sizes[letter] for letter in axes.split())


Rules = tuple[Rule, ...]
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
    Rule("lm_head.weight", OUTPUT, "V H", "output", when=UNTIED),
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
    Rule("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", "D", "norms", when="qk_layernorm"),
    Rule("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", "D", "norms", when="qk_layernorm"),
)
FULL_WIDTH_NORMS: Rules = (
    Rule("self_attn.q_norm.weight", "self_attention.q_layernorm.norm.weight", "Q", "norms"),
    Rule("self_attn.k_norm.weight", "self_attention.k_layernorm.norm.weight", "K", "norms"),
)
LATENT_ATTENTION: Rules = (
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
    Rule("self_attn.q_proj.weight", ATTENTION + "q_proj.weight", "T H", "attention", unless="q_lora_rank"),
)
DENSE: Rules = (
    Rule("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "H", "norms"),
    *gated("mlp.*.weight", "mlp.", "F", "mlp"),
)
MOE_NORM = Rule("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "H", "norms")
ROUTER = Rule("mlp.gate.weight", "mlp.router.weight", "E H", "router")
SHARED_EXPERTS = gated(
    "mlp.shared_experts.*.weight", SHARED, "S", "shared experts", when="moe_shared_expert_intermediate_size"
)
SEPARATE = gated("mlp.experts.{e}.*.weight", EXPERTS, "I", "experts")
FUSED: Rules = (
    Rule("mlp.experts.gate_up_proj", EXPERTS + "linear_fc1.weight", "E J H", "experts"),
    Rule("mlp.experts.down_proj", EXPERTS + "linear_fc2.weight", "E H I", "experts"),
)


def corrected_router(correction: str, gate: str = "mlp.gate.weight", *, float32: bool = True) -> Rules:
    """Return the rules of a router whose choice, not its scores, is moved by a bias of each expert."""
    return (
        Rule(gate, "mlp.router.weight", "E H", "router"),
        Rule(correction, "mlp.router.expert_bias", "E", "router", when=BIASED, float32=float32),
    )


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """The tensors of a family: outside of all layers, of every layer, and of each kind of layer.

    `separate` and `fused` are the two ways to write a layer's experts: as published folders and transformers
    4 have them, mostly a tensor for each, or all in one, as transformers 5 has them. Either may be empty.
    """

    outside: Rules = OUTSIDE
    layers: str = "model.layers.{}."
    """What the names of a layer's tensors begin with, by its number."""
    layer: Rules
    moe: Rules
    separate: Rules = SEPARATE
    fused: Rules = FUSED
    interleaved: bool = False
    """Whether fused experts are `[E, H, 2F]`, the columns of gate and up in turn, and `[E, F, H]`."""
    dense: Rules = ()
    predicting: bool = False
    """Whether layers for multi-token prediction may follow: `num_nextn_predict_layers` of config.json."""
