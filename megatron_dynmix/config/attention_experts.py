"""What a model with attention experts (`attention_experts`) must have, and what its attention cannot do."""

from __future__ import annotations

from types import SimpleNamespace

from megatron_dynmix.config import rotary
from megatron_dynmix.config.megatron_fields import megatron_fields, model_settings, moe_layers
from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError

_NO_WEIGHTS_OF_IT = "attention experts have two matrices each, and no weights for it"
_NO_ROTARY = "stick-breaking attention knows near from far by itself and has no rotary embedding"
_NO_SOFTMAX = "stick-breaking attention is computed by blocks of its own, without a softmax"
REFUSED = {
    **dict.fromkeys(("add_bias_linear", "add_qkv_bias", "qk_layernorm"), _NO_WEIGHTS_OF_IT),
    **dict.fromkeys(("multi_latent_attention", "attention_output_gate"), _NO_WEIGHTS_OF_IT),
    **dict.fromkeys(("apply_rope_fusion", "rotary_interleaved", "no_rope_freq"), _NO_ROTARY),
    **dict.fromkeys(("attention_dropout", "window_size", "window_attn_skip_freq"), _NO_SOFTMAX),
    "fp8": "its matrices of all experts are multiplied in the model's own precision",
    "fp4": "its matrices of all experts are multiplied in the model's own precision",
    "fine_grained_activation_offloading": "its activations are not offloaded",
}
"""Megatron-Core's settings that would be left out or fail, and why."""


def counted_experts(config: RunConfig, num_moe_experts: int | None) -> int:
    """Return how many experts the routers have that gate loads are made of; 1 for a dense model."""
    of_attention = config.mixing.load_routers == "attention"
    return (config.model.attention_experts if of_attention else num_moe_experts) or 1


def check_attention_experts(config: RunConfig) -> None:
    """Refuse what does not go with attention experts: the first thing found, and what would."""
    model = config.model
    if model.attention_experts is None:
        if config.mixing.load_routers == "attention":
            raise InputError(
                "mixing.load_routers is attention, but the attention of this model has no experts; leave it "
                "out, or set model.attention_experts"
            )
        return
    settings = model_settings(config)
    _check_shape(model.attention_experts, settings)
    defaults = megatron_fields()["TransformerConfig"]
    for name, why in REFUSED.items():
        value = getattr(settings, name)
        if value not in (None, False, 0, ()):
            usual = defaults[name].default
            how = f"set it to {str(False if usual is True else 0).lower()}" if usual else "leave it out"
            raise InputError(f"{name} is {value} with attention_experts: {why}; {how}")
    if settings.softmax_type != "vanilla":
        raise InputError(
            f"softmax_type is {settings.softmax_type} with attention_experts: {_NO_SOFTMAX}; leave it out"
        )
    if model.qk_layernorm_full_width:
        raise InputError(f"qk_layernorm_full_width with attention_experts: {_NO_WEIGHTS_OF_IT}; leave it out")
    flat = model.flat()
    own = {name: flat.get(name) for name in ("rotary_base", rotary.INTERPOLATED)}
    given = [name for name, value in own.items() if value is not None]
    given += [rotary.SHARE] if model.rotary_percent != 1 else []
    given += [name for name in ("rope_type", *rotary.YARN) if name in model.megatron]
    if given:
        raise InputError(f"{', '.join(given)} with attention_experts: {_NO_ROTARY}; leave it out")
    again = settings.recompute_modules or ["core_attn"]
    if settings.recompute_granularity == "selective" and "core_attn" in again:
        raise InputError(
            "recompute_modules has core_attn (as if nothing is named), but stick-breaking attention keeps no "
            "scores and always computes them again; name others, such as [moe, layernorm]"
        )


def _check_shape(experts: int, settings: SimpleNamespace) -> None:
    """Refuse sizes that no attention experts have here, and layers without experts."""
    if not settings.num_moe_experts or moe_layers(settings) != list(range(settings.num_layers)):
        raise InputError(
            f"attention_experts is {experts}, but not every layer's MLP has experts too; set "
            "num_moe_experts, and leave out moe_layer_freq"
        )
    heads, groups, width = settings.num_attention_heads, settings.num_query_groups, settings.kv_channels
    if groups != 1 or width != settings.hidden_size:
        raise InputError(
            f"num_query_groups is {groups} and kv_channels {width} with attention_experts: keys and values "
            "are what enters the layer, one head as wide as the model; set num_query_groups to 1 and "
            f"kv_channels to {settings.hidden_size}"
        )
    if heads > experts:
        raise InputError(
            f"num_attention_heads is {heads}, but there are {experts} attention experts, and a token attends "
            f"with another one for each head; use 1 to {experts}"
        )
