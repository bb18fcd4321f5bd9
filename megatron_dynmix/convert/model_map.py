"""The map of a whole model: which tensors its family's rules make of its settings, and the blocks of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from megatron_dynmix.config.megatron_fields import moe_layers
from megatron_dynmix.convert.weight_map import Block, WeightMap
from megatron_dynmix.errors import InputError
from megatron_dynmix.families import FAMILIES
from megatron_dynmix.families.names import EMBEDDING, OUTPUT, UNTIED, Rule, Shape

VOCABULARY = (EMBEDDING, OUTPUT)
"""Megatron tensors with a row for each token."""


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
    names = family.names
    if fused_experts and not names.fused:
        raise InputError(f"{hf_config['model_type']} has one layout of its experts only; leave out --experts")
    settings = {UNTIED: True, **settings}
    moe = (*names.moe, *(names.fused if fused_experts or not names.separate else names.separate))
    rules: list[tuple[int | None, Rule]] = [(None, rule) for rule in names.outside]
    routed = moe_layers(SimpleNamespace(**{"moe_layer_freq": 1, **settings}))
    for layer in range(settings["num_layers"]):
        assert layer in routed or names.dense, f"a dense layer in {hf_config['model_type']}"
        rules += [(layer, rule) for rule in (*names.layer, *(moe if layer in routed else names.dense))]
    return _lay_out(settings, rules, names.layers, padded_vocab)


def sizes_of(settings: Mapping[str, Any]) -> dict[str, int]:
    """Letter -> size, from the settings of the `model` section.

    V vocabulary, L layers, H hidden, E experts, N heads, G KV groups, D width of a head, Q = N D, K = G D,
    F inner width of a dense layer, I of an expert, S of the shared experts, J = 2 I and U = 2 S (gate and up
    in one).
    Latent attention: A width of the queries' latent, C of that of keys and values, M the same with the
    rotary part of the keys, T queries of all heads, P keys and values of all heads, O values of all heads.
    ModuleFormer: X attention experts, W inner width of a router.
    """
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    groups = settings.get("num_query_groups") or heads
    width = settings.get("kv_channels") or hidden // heads
    inner = settings.get("ffn_hidden_size") or 4 * hidden
    expert = settings.get("moe_ffn_hidden_size") or inner
    latent, plain, rotary, value = (
        settings.get(name) or 0
        for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    )
    shared = settings.get("moe_shared_expert_intermediate_size") or 0
    return {
        "1": 1,
        "V": settings["vocab_size"],
        "L": settings["num_layers"],
        "H": hidden,
        "E": settings["num_moe_experts"],
        "N": heads,
        "G": groups,
        "D": width,
        "Q": heads * width,
        "K": groups * width,
        "F": inner,
        "I": expert,
        "J": 2 * expert,
        "S": shared,
        "U": 2 * shared,
        "A": settings.get("q_lora_rank") or 0,
        "C": latent,
        "M": latent + rotary,
        "T": heads * (plain + rotary),
        "P": heads * (plain + value),
        "O": heads * value,
        "X": settings.get("attention_experts") or 0,
        "W": settings.get("router_width") or 0,
    }


def _lay_out(
    settings: Mapping[str, Any],
    rules: Iterable[tuple[int | None, Rule]],
    layers: str,
    padded_vocab: int | None,
) -> WeightMap:
    """Make the map of a model from rules, each with the layer it is for, or None outside of all layers.

    The Hugging Face names of a layer's tensors begin with `layers`, which has room for its number.
    In the checkpoint, tensors of `VOCABULARY` have `padded_vocab` rows; one for each token if None.
    """
    sizes = sizes_of(settings)
    stacked = (settings.get("moe_layer_freq") or 1) == 1  # as Megatron-Core does if layers are of one kind
    hf_shapes: dict[str, Shape] = {}
    megatron_shapes: dict[str, Shape] = {}
    groups: dict[str, str] = {}
    float32: set[str] = set()
    blocks: list[Block] = []
    for layer, rule in rules:
        if (rule.when and not settings.get(rule.when)) or (rule.unless and settings.get(rule.unless)):
            continue
        prefix, megatron = "", rule.megatron
        place: Shape = ()
        axes: Shape = ()
        if layer is not None:
            prefix = layers.format(layer)
            megatron = "decoder.layers." + ("" if stacked else f"{layer}.") + megatron
            place, axes = ((layer,), (sizes["L"],)) if stacked else ((), ())
        experts: list[Shape] = [()]
        if "{e}" in rule.names[0]:
            experts, axes = [(e,) for e in range(sizes["E"])], (*axes, sizes["E"])
        pieces = rule.pieces(sizes)
        last = pieces[-1]
        megatron_shapes[megatron] = (*axes, last.megatron_offset[0] + last.shape[0], *last.shape[1:])
        groups[megatron] = rule.group
        for expert, piece in itertools.product(experts, pieces):
            name = prefix + piece.hf.format(e=expert[0] if expert else None)
            hf_shapes[name] = piece.hf_shape
            offset = (*place, *expert, *piece.megatron_offset)
            blocks.append(Block(name, piece.hf_offset, megatron, offset, piece.shape, piece.transposed))
            float32 |= {name, megatron} if rule.float32 else set()
    vocab = sizes["V"]
    assert padded_vocab is None or padded_vocab >= vocab, f"{padded_vocab} rows for {vocab} tokens"
    padded = {name: vocab for name in VOCABULARY if name in groups}
    for name in padded:
        megatron_shapes[name] = (padded_vocab or vocab, *megatron_shapes[name][1:])
    return WeightMap(hf_shapes, megatron_shapes, tuple(blocks), groups, padded, frozenset(float32))
