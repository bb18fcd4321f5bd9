"""ModuleFormer (MoLM): attention by breaking sticks, its projections and the MLPs mixtures of experts.

Source: the configuration and modelling code published with the model (IBM/ModuleFormer).
"""

from __future__ import annotations

from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.families.dialect import Dialect, Only, Values, require_whole
from megatron_dynmix.families.family import Family
from megatron_dynmix.families.names import (
    EMBEDDING,
    EXPERTS,
    OUTPUT,
    UNTIED,
    NameMap,
    Rule,
    Rules,
    Transposed,
)

NO_DROPOUT = Only(0, "no published model has dropout")
ONE_KIND = "every published model has it so, and nothing else is built here"
ONLY: dict[str, Only] = {
    "n_head": Only(1, "with more heads keys and values are projected, which is not built"),
    "activation_function": Only("gelu_new", ONE_KIND),
    "gate_type": Only("mlp", ONE_KIND),
    "sample_topk": Only(0, "experts are chosen, not drawn"),
    **dict.fromkeys(("moe_pdrop", "attn_pdrop", "embd_pdrop", "resid_pdrop"), NO_DROPOUT),
}
COMMON = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "ffd_hidden",
    "num_experts": "n_mlp_experts",
    "num_experts_per_tok": "k_mlp",
    "num_attention_heads": "k_att",
    "head_dim": "att_hidden",
}
"""The other families' name -> theirs."""
ALIASES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
"""Other names under which its configuration takes a setting; as published, none is used."""
OWN = {"router_width": "gating_size", "attention_experts": "n_att_experts"}
"""Our name -> theirs."""
OF_TORCH = 1e-5
"""Epsilon of its norms, which are torch's own, whatever `layer_norm_epsilon` says."""
POSITIONS = 1 << 20
"""Positions are nowhere in the weights; a limit is asked for, and this is none."""
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50295,
    "block_size": 512,
    "history_length": 512,
    "n_embd": 1024,
    "n_layer": 24,
    "n_head": 8,
    "att_hidden": 512,
    "ffd_hidden": 2048,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "moe_pdrop": 0.0,
    "sample_topk": 0,
    "gating_size": 256,
    "n_att_experts": 32,
    "k_att": 2,
    "n_mlp_experts": 32,
    "k_mlp": 2,
    "gate_type": "mlp",
    "tie_word_embeddings": False,
}
"""What the published code takes for settings that config.json does not say."""


def in_common_words(config: Values) -> dict[str, Any]:
    """Say what `config` says as the other families do: each expert of a token is a head of queries."""
    for name in (*COMMON.values(), *OWN.values()):
        require_whole(name, config[name])
    for other, name in ALIASES.items():
        if config.get(other, config[name]) != config[name]:
            raise InputError(f"{other} is {config[other]!r} and {name} {config[name]!r}; give {name} alone")
    if config["k_att"] > config["n_att_experts"]:
        raise InputError(
            f"k_att is {config['k_att']}, and there are {config['n_att_experts']} attention experts; the "
            "config.json is not that of the model"
        )
    if config["att_hidden"] != config["n_embd"] and config["n_head"] == 1:
        raise InputError(
            f"att_hidden is {config['att_hidden']} and n_embd {config['n_embd']}: keys and values are "
            "projected then; only models where they are what enters the layer can be run here, as in every "
            "published MoLM"
        )
    return {
        **config,
        **{common: config[theirs] for common, theirs in COMMON.items()},
        "num_key_value_heads": 1,
        "rms_norm_eps": OF_TORCH,
        "max_position_embeddings": POSITIONS,
    }


def own_settings(config: Values) -> dict[str, Any]:
    """Return our settings of attention experts and routers."""
    return {ours: config[theirs] for ours, theirs in OWN.items()}


def in_own_words(config: Values, settings: Values) -> dict[str, Any]:
    """Undo `in_common_words`, and say what `own_settings` reads from our `model` section."""
    foreign = {
        *COMMON,
        *("num_key_value_heads", "hidden_act", "attention_dropout", "sliding_window", "rms_norm_eps"),
        "max_position_embeddings",
    }
    said = {name: value for name, value in config.items() if name not in foreign}
    said |= {theirs: config[common] for common, theirs in COMMON.items() if common in config}
    return said | {
        **{theirs: settings[ours] for ours, theirs in OWN.items()},
        "att_hidden": settings["kv_channels"],
        "block_size": DEFAULTS["block_size"],
        "history_length": DEFAULTS["history_length"],
        "layer_norm_epsilon": OF_TORCH,
        "aux_loss_weight": 0,
    }


def _norm(theirs: str, ours: str) -> Rules:
    return tuple(Rule(f"{theirs}.{kind}", f"{ours}.{kind}", "H", "norms") for kind in ("weight", "bias"))


def _router(theirs: str, ours: str, experts: str) -> Rules:
    """Return the rules of a router, whose second matrix has a row for each of its `experts`."""
    return (
        Rule(f"{theirs}.gate.w_gate.0.weight", f"{ours}.router.weight", "W H", "router"),
        Rule(f"{theirs}.gate.w_gate.0.bias", f"{ours}.router.inner_bias", "W", "router"),
        Rule(f"{theirs}.gate.w_gate.3.weight", f"{ours}.router.output_weight", f"{experts} W", "router"),
    )


MODULEFORMER = Family(
    title="MoLM 350M-4B, 700M-4B, 700M-8B",
    since="0.1.0",
    dialect=Dialect(
        architecture="ModuleFormerForCausalLM",
        names={"num_moe_experts": "num_experts"},
        fixed={
            "normalization": "LayerNorm",
            "gated_linear_unit": False,
            "activation": "gelu-tanh",
            "router_network": "gelu",
            "moe_router_pre_softmax": True,
        },
        must=ONLY,
        rotary=False,
        defaults=DEFAULTS,
        plain=in_common_words,
        own=own_settings,
        published=in_own_words,
    ),
    names=NameMap(
        outside=(
            Rule("transformer.wte.weight", EMBEDDING, "V H", "embedding"),
            *_norm("transformer.ln_f", "decoder.final_layernorm"),
            Rule("lm_head.weight", OUTPUT, "V H", "output", when=UNTIED),
        ),
        layers="transformer.h.{}.",
        layer=(
            *_norm("ln_1", "input_layernorm"),
            *_router("attn.q_proj", "self_attention", "X"),
            Rule("attn.q_proj.experts.weight", "self_attention.query_weight", "X H D", "attention"),
            Rule("attn.q_proj.output_experts.weight", "self_attention.output_weight", "X D H", "attention"),
        ),
        moe=(
            *_norm("ln_2", "pre_mlp_layernorm"),
            *_router("mlpf", "mlp", "E"),
            Transposed("mlpf.experts.weight", EXPERTS + "linear_fc1.weight", "E H I", "experts"),
            Transposed("mlpf.output_experts.weight", EXPERTS + "linear_fc2.weight", "E I H", "experts"),
        ),
        separate=(),
        fused=(),
    ),
    refused={
        "`att_hidden` other than `n_embd`": "keys and values are projected then, which is not built",
    },
)
