"""Where the model's shape comes from: published sizes, a Hugging Face folder, or the settings alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_dynmix.config.model_defaults import model_defaults
from megatron_dynmix.config.run_config import ModelConfig
from megatron_dynmix.errors import InputError

COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
}
"""What all presets share: a pre-norm SwiGLU decoder with RMSNorm and a top-k router."""

PRESETS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)
"""Name -> the settings of published sizes, beside `COMMON`."""
SHAPE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "num_attention_heads"),
    *("num_query_groups", "kv_channels", "num_moe_experts", "moe_layer_freq", "vocab_size"),
    *("moe_shared_expert_intermediate_size", "qk_layernorm", "qk_layernorm_full_width", "normalization"),
    *("gated_linear_unit", "add_bias_linear", "add_qkv_bias", "moe_shared_expert_gate"),
    *("moe_router_enable_expert_bias", "layernorm_zero_centered_gamma"),
    *("untie_embeddings_and_output_weights", "router_network", "router_noise"),
    *("router_width", "attention_experts", "activation"),
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"),
    *("v_head_dim", "softmax_type", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
)
"""Settings of the model section that decide which tensors the model has, or what it makes of them."""
NEEDED = (
    *("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"),
    "rotary_base",
)
CONFIG_FILES = ("config.json", "hugging_face/config.json")
"""Where a folder has it: a Hugging Face model, or one that was converted from it."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def is_folder(preset: object) -> bool:
    """Whether a preset is meant as a path; a folder beside one is written `./NAME`."""
    return isinstance(preset, str) and ("/" in preset or preset.startswith(("~", "$")))


def complete_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what preset or folder say of the model; what is given beside them wins.

    What a folder says is written out in the result, whose preset is None: it then means the same on a machine
    that does not have the folder. Settings beside a folder that belong to another model are refused.
    """
    load_hf = given.get("load_hf")
    preset = given.get("preset", ModelConfig.preset if load_hf is None else None)
    if "preset" in given and preset is None:
        no_rotary = ("rotary_base",) if given.get("attention_experts") else ()
        if missing := [name for name in NEEDED if given.get(name) is None and name not in no_rotary]:
            raise InputError(
                f"model.preset is null, so the model is what its section says, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing; set them, or name a preset"
            )
        return {**COMMON, **given}
    folder = load_hf if load_hf is not None else preset if is_folder(preset) else None
    # A preset beside a folder that is on other machines says as much; `train` refuses to start without it.
    if folder is None or (preset in PRESETS and not Path(folder).exists()):
        return {**COMMON, **_published(preset), **given, "preset": preset}
    base = read_shape(Path(folder))
    if load_hf is not None and preset is not None:
        other = read_shape(Path(preset)) if is_folder(preset) else _published(preset)
        _agree({name: value for name, value in other.items() if name not in given}, base, load_hf, preset)
    if differing := other_shape({**base, **given}, base):
        changes = ", ".join(f"{name} {given[name]} (there {base.get(name)})" for name in differing)
        raise InputError(
            f"the model of {folder} has another shape than the settings: {changes}; leave them out"
        )
    return {**COMMON, **base, **given, "preset": None}


def _published(preset: Any) -> Mapping[str, Any]:
    if preset not in PRESETS:
        raise InputError(
            f"model.preset is {preset!r}; it must be one of {', '.join(PRESETS)}, or the path of a folder "
            "with a config.json (./NAME for one in the folder of the file)"
        )
    return PRESETS[preset]


def read_shape(folder: Path) -> dict[str, Any]:
    """Return our model section for the model that a folder's config.json describes."""
    from megatron_dynmix.config.hugging_face import read_config  # with all families; named sizes need none

    path = next((folder / name for name in CONFIG_FILES if (folder / name).is_file()), None)
    if path is None:
        what = "holds no config.json" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder} {what}; give the folder of a Hugging Face model, or of a converted one")
    return read_config(path, "fetch the model again")[1]


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has its tokenizer in it."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _agree(preset: Mapping[str, Any], base: Mapping[str, Any], load_hf: str, name: str) -> None:
    if differing := [key for key in preset if key in base and preset[key] != base[key]]:
        changes = ", ".join(f"{key} {preset[key]} (there {base[key]})" for key in differing)
        raise InputError(
            f"model.preset is {name}, but model.load_hf is {load_hf}, a model of another kind: {changes}; "
            "leave out the preset"
        )


def other_shape(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the settings in which two model sections have other tensors."""
    defaults = {**model_defaults(), **COMMON}

    def value(settings: Mapping[str, Any], name: str) -> Any:
        found = settings.get(name, defaults.get(name)) or None
        if found is None and (one.get(name) or other.get(name)):
            found = _implied(settings).get(name)
        return found is not None if name == "router_noise" else found  # its weights are there or not

    return [name for name in SHAPE if value(one, name) != value(other, name)]


def _implied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that Megatron-Core takes from others where they are not given."""
    heads = settings.get("num_attention_heads")
    return {
        "num_query_groups": heads,
        "kv_channels": settings["hidden_size"] // heads if heads else None,
        "moe_ffn_hidden_size": settings.get("ffn_hidden_size"),
    }
