"""config.json of a Hugging Face model <-> our `model` section, by the dialect of its family.

What we cannot run as written is refused, and what is not said is what `transformers` makes of that.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_dynmix.config import rotary
from megatron_dynmix.config.hugging_face_defaults import completed, defaults_of, unsaid
from megatron_dynmix.config.model_defaults import model_defaults
from megatron_dynmix.config.quantization import WORD, quantization_of
from megatron_dynmix.errors import InputError
from megatron_dynmix.families import FAMILIES
from megatron_dynmix.families.dialect import NAMES, Dialect, Only, Values
from megatron_dynmix.files import read_object

SILU = Only("silu", "experts are gated by SiLU")
TIED = ("tie_word_embeddings", True)
TEXT = "text_config"
"""Where config.json of a multimodal model speaks of its language model."""
USUAL: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "qk_layernorm": False,
    "qk_layernorm_full_width": False,
    "add_qkv_bias": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
}
"""Settings of the families that say nothing else."""
PLAIN = (
    *("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm", "rotary_interleaved"),
    *("window_size", "softmax_scale", "multi_latent_attention", "attention_output_gate"),
    *("moe_router_score_function", "moe_router_topk_scaling_factor", "moe_router_num_groups"),
    *("moe_router_enable_expert_bias", "moe_apply_probs_on_input", "moe_router_topk_limited_devices"),
    *("moe_latent_size", "softmax_type", "no_rope_freq", "linear_attention_freq"),
    *("experimental_attention_variant", "activation_func_clamp_value", "glu_linear_offset"),
    *(
        rotary.SHARE,
        "latent_layernorm_epsilon",
        "mtp_num_layers",
        "heterogeneous_block_specs",
        "router_network",
        "router_noise",
    ),
    *("router_width", "attention_experts", "activation", "window_attn_skip_freq"),
    *("embedding_multiplier", "residual_multiplier", "logits_scaling"),
)
"""Settings that change what a model computes, and that config.json means the default of without a word."""


def read_config(path: Path, remedy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a config.json holds, and the `model` section that it means."""
    config = read_object(path, remedy)
    text = text_of(config)
    try:
        return config, model_settings(text)
    except InputError as error:
        known = text.get("model_type") in FAMILIES
        raise InputError(f"{path}: {error}{unsaid(text) if known else ''}") from None


def text_of(config: Values) -> Values:
    """Return what a config.json says of the language model in a multimodal one; of any other, all of it."""
    text = config.get(TEXT)
    if not isinstance(text, dict) or config.get("model_type") in FAMILIES:
        return config
    # what is said of the whole model holds for its language model too
    return {**text, **{name: config[name] for name in (TIED[0], WORD) if name in config}}


def model_settings(config: Values) -> dict[str, Any]:
    """Return our `model` section for a Hugging Face model: what decides its tensors and what it computes.

    What only training reads (the coefficient of the balance loss) is not taken over. A family that is not
    known, a setting that we cannot run and one that is missing are refused.
    """
    dialect = _dialect(config)
    config = dialect.plain(completed(config))
    _refuse_what_we_cannot_run(config, dialect)
    names = {**NAMES, **dialect.names}
    settings = {ours: _said(config, theirs) for ours, theirs in names.items()}
    for ours in settings.keys() - {"layernorm_epsilon"}:
        _require_size(names[ours], settings[ours])
    heads = settings["num_attention_heads"]
    groups, width = config.get("num_key_value_heads"), config.get("head_dim")
    settings["num_query_groups"] = heads if groups is None else groups
    settings["kv_channels"] = settings["hidden_size"] // heads if width is None else width
    _require_size("num_key_value_heads", settings["num_query_groups"])
    _require_size("head_dim", settings["kv_channels"])
    if heads % settings["num_query_groups"]:
        raise InputError(
            f"num_key_value_heads is {groups}, which does not divide num_attention_heads {heads}; the "
            "config.json is not that of the model"
        )
    switches = {**dialect.switches, "untie_embeddings_and_output_weights": TIED}
    for ours, (theirs, opposite) in switches.items():
        settings[ours] = _truth(config, theirs) is not opposite
    latent = bool(dialect.fixed.get("multi_latent_attention"))
    if dialect.rotary:
        settings |= rotary.rotary_settings(config, latent=latent, partial=dialect.partial_rotary)
    settings["attention_dropout"] = config.get("attention_dropout", 0.0)
    _check_numbers(settings)
    settings["moe_layer_freq"] = _moe_layer_freq(config, settings["num_layers"]) if dialect.mixed else 1
    settings = {**USUAL, **settings, **dialect.fixed, **dialect.own(config)}
    normed = not settings["moe_router_pre_softmax"] or "moe_router_score_function" in settings
    if settings["moe_router_topk"] == 1 and normed:
        raise InputError(
            "num_experts_per_tok is 1 and norm_topk_prob true: every weight would be 1 and the router learn "
            "nothing; Megatron-Core has no such model"
        )
    return settings


def hugging_face_config(settings: Values) -> dict[str, Any]:
    """Return config.json for a flat `model` section: of the first family that computes what the model does.

    Token ids are null: a model does not know its tokenizer. If no family has all of it, the refusal says what
    the closest has not.
    """
    defaults, given = model_defaults(), _completed(settings)
    wrong: dict[str, list[str]] = {}
    for model_type, family in FAMILIES.items():
        dialect = family.dialect
        means = {**{name: defaults[name] for name in PLAIN}, **USUAL, **dialect.fixed}
        usual = dialect.plain(defaults_of(model_type))
        said = {*dialect.names, *dialect.switches, *dialect.own(usual)}
        said |= {rotary.SHARE} if dialect.partial_rotary else set()
        wrong[model_type] = [name for name in means if name not in said and given[name] != means[name]]
        wrong[model_type] += ["num_moe_experts"] if given["num_moe_experts"] is None else []
        if not wrong[model_type]:
            config = _written(model_type, dialect, given)
            try:
                read = model_settings(config)
            except InputError:  # it cannot be without something that this model is without
                wrong[model_type] = [name for name in dialect.names if given[name] is None] or [
                    *dialect.names
                ]
                continue
            wrong[model_type] = [name for name, value in read.items() if not _equal(given.get(name), value)]
            if not wrong[model_type]:
                return config
    closest = min(wrong, key=lambda name: len(wrong[name]))
    shown = ", ".join(f"{name} {given.get(name)!r}" for name in wrong[closest])
    raise InputError(
        f"no family of Hugging Face models that is known ({', '.join(FAMILIES)}) computes what this model "
        f"does; {closest} has no {shown}; it can be trained, but not be written for transformers"
    )


def _completed(settings: Values) -> dict[str, Any]:
    """Return the settings, those not given filled in as Megatron-Core would."""
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    inner = settings.get("ffn_hidden_size") or 4 * hidden
    filled: dict[str, Any] = {
        **model_defaults(),
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "ffn_hidden_size": inner,
        "moe_ffn_hidden_size": inner,
        **{name: value for name, value in settings.items() if value is not None},
    }
    if (yarn := rotary.yarn_of(filled)) is not None:
        filled |= {"rope_type": "yarn", **yarn}
    frequency = filled["moe_layer_freq"]
    if isinstance(frequency, int):
        frequency = [int(index % frequency == 0) for index in range(filled["num_layers"])]
    filled["moe_layer_freq"] = 1 if all(frequency) else list(frequency)
    if filled["window_size"] is not None:
        step, filled["window_size"] = filled["window_attn_skip_freq"], list(filled["window_size"])
        if not isinstance(step, list | tuple):
            layers = range(1, filled["num_layers"] + 1)
            step = [int(step is None or layer % step != 0) for layer in layers]
        filled["window_attn_skip_freq"] = list(step)
    if filled["router_noise"] is not None:
        filled["router_noise"] = "training"  # that its weights are there is what config.json says
    return filled


def _written(model_type: str, dialect: Dialect, given: Values) -> dict[str, Any]:
    config = {theirs: given[ours] for ours, theirs in {**NAMES, **dialect.names}.items()}
    config |= {theirs: given[ours] is not opposite for ours, (theirs, opposite) in dialect.switches.items()}
    if dialect.mixed:
        frequency = given["moe_layer_freq"]
        dense = [] if frequency == 1 else [index for index, is_moe in enumerate(frequency) if not is_moe]
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    rope = rotary.in_config(given) if dialect.rotary else {}
    if given["kv_channels"] * given["num_attention_heads"] != given["hidden_size"] or "rope_scaling" in rope:
        config["head_dim"] = given["kv_channels"]  # which transformers 5 wants to scale Mixtral's embedding
    written = {
        "architectures": [dialect.architecture],
        "model_type": model_type,
        **config,
        "num_key_value_heads": given["num_query_groups"],
        "hidden_act": "silu",
        "attention_dropout": given["attention_dropout"],
        **rope,
        "tie_word_embeddings": not given["untie_embeddings_and_output_weights"],
        "sliding_window": None,
        **{name: only.value for name, only in dialect.must.items()},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    return dialect.published(written, given)


def _dialect(config: Values) -> Dialect:
    family = FAMILIES.get(str(config.get("model_type")))
    known = ", ".join(f"{name} ({item.dialect.architecture})" for name, item in FAMILIES.items())
    if family is None:
        raise InputError(f"model_type is {config.get('model_type')!r}, which is not known; known are {known}")
    given = config.get("architectures")
    if given and given != [family.dialect.architecture]:
        raise InputError(f"architectures is {given}; only language models are known: {known}")
    return family.dialect


def _equal(one: Any, other: Any) -> bool:
    """Whether two settings are the same, but for the rounding of a number that follows from another."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)


def _said(config: Values, name: str) -> Any:
    if config.get(name) is None:
        raise InputError(f"{name} is not in it, and without it the shape of the model is not known")
    return config[name]


def _truth(config: Values, name: str) -> bool:
    value = config.get(name)
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be true or false")
    return value


def _require_size(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise InputError(f"{name} is {value!r}; it must be a whole number, 1 or more")


def _check_numbers(settings: Values) -> None:
    epsilon, dropout = settings["layernorm_epsilon"], settings["attention_dropout"]
    if not _is_number(epsilon) or epsilon <= 0:
        raise InputError(f"rms_norm_eps is {epsilon!r}; it must be a number above 0")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise InputError(f"attention_dropout is {dropout!r}; it must be a number from 0 to below 1")
    chosen, experts = settings["moe_router_topk"], settings["num_moe_experts"]
    if chosen > experts:
        raise InputError(
            f"num_experts_per_tok is {chosen}, and there are {experts} experts; the config.json is not "
            "that of the model"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_what_we_cannot_run(config: Values, dialect: Dialect) -> None:
    quantization_of(config)
    for name, (value, why) in {"hidden_act": SILU, **dialect.must}.items():
        if config.get(name, value) != value:
            raise InputError(f"{name} is {config[name]!r}, and only {value!r} can be run here: {why}")
    if not dialect.windows:
        _refuse_windows(config)


def _refuse_windows(config: Values) -> None:
    """Refuse attention that looks back no further than a window shorter than the longest rows."""
    known = defaults_of(config["model_type"])
    if "sliding_window" not in known:
        return  # the family has none, whatever is said
    used = "use_sliding_window" not in known or _truth(config, "use_sliding_window")
    window = config["sliding_window"] if used else None
    if window is not None:
        _require_size("sliding_window", window)
        if window < _said(config, "max_position_embeddings"):
            raise InputError(
                f"sliding_window is {window}: attention here is over the whole sequence; set it to null if "
                "rows are no longer than that"
            )
    elif "sliding_attention" in (config.get("layer_types") or ()):
        raise InputError("layer_types names sliding_attention, and attention here is over the whole sequence")


def _moe_layer_freq(config: Values, layers: int) -> int | list[int]:
    """As Qwen says it: every `decoder_sparse_step`-th layer is MoE, but none of `mlp_only_layers`."""
    step = config["decoder_sparse_step"]
    dense = config.get("mlp_only_layers") or []
    if type(step) is not int or step < 1 or not isinstance(dense, list):
        raise InputError(
            f"decoder_sparse_step is {step!r} and mlp_only_layers {dense!r}; they must be a whole number, "
            "1 or more, and a list of layers"
        )
    pattern = [int(index not in dense and (index + 1) % step == 0) for index in range(layers)]
    if not any(pattern):
        raise InputError(
            f"decoder_sparse_step {step} and mlp_only_layers {dense} leave no layer with experts; dense "
            "models are not known"
        )
    return 1 if all(pattern) else pattern
