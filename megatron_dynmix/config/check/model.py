"""What Megatron-Core would only find while it builds the model, or take for something else."""

from __future__ import annotations

from types import SimpleNamespace

from megatron_dynmix.config import rotary
from megatron_dynmix.config.check.layout import check_divides
from megatron_dynmix.config.megatron_fields import megatron_fields, model_settings
from megatron_dynmix.config.run_config import ModelConfig, RunConfig, require
from megatron_dynmix.errors import InputError


def check_model(config: RunConfig) -> None:
    """Refuse what Megatron-Core would only find while it builds the model, or route into nothing."""
    model = model_settings(config)
    require(model.num_layers >= 1, "model.num_layers", model.num_layers, "1 or more")
    latent = megatron_fields()["MLATransformerConfig"].keys() - {*rotary.SETTINGS}
    given = sorted(latent & config.model.megatron.keys())
    given += ["latent_layernorm_epsilon"] if config.model.latent_layernorm_epsilon is not None else []
    if not model.multi_latent_attention and given:
        raise InputError(
            f"{', '.join(given)}: only multi-latent attention has that; set multi_latent_attention, or leave "
            "it out"
        )
    _check_rotary(config.model, model)
    loads = config.model.load_hf or config.checkpoint.pretrained_checkpoint
    if config.parallel.megatron.get("perform_initialization") is False and not loads:
        raise InputError(
            "perform_initialization is false, but no weights are loaded: they would be any numbers; "
            "leave it out, or give load_hf or pretrained_checkpoint"
        )
    heads, groups = model.num_attention_heads, model.num_query_groups or 1
    check_divides(f"num_attention_heads is {heads}", heads, "num_query_groups", groups)
    experts, topk = model.num_moe_experts, model.moe_router_topk
    if experts and not 1 <= topk <= experts:
        raise InputError(f"moe_router_topk is {topk}, but there are {experts} experts; use 1 to {experts}")


def _check_rotary(given: ModelConfig, model: SimpleNamespace) -> None:
    """Refuse settings of the rotary embedding that would be left out, or computed otherwise."""
    rope, yarn = given.megatron.get("rope_type"), rotary.yarn_of(given.megatron)
    require(rope in (None, "rope", "yarn"), "model.rope_type", rope, "rope or yarn")
    latent, factor = model.multi_latent_attention, given.rotary_seq_len_interpolation_factor
    named = [name for name in rotary.YARN if name in given.megatron]
    if not given.yarn_correction_range_round_to_int:
        named += [rotary.TRUNCATED]
    if named and yarn is None and not latent:
        raise InputError(f"{', '.join(named)}: only YaRN has that; set rope_type to yarn, or leave it out")
    if factor is not None and (latent or yarn is not None):
        raise InputError(
            f"{rotary.INTERPOLATED} is {factor}, and the rotary embedding is that of "
            f"{'latent attention' if latent else 'YaRN'}, which has a scale of its own; leave it out"
        )
    if latent and rotary.TRUNCATED in named:
        raise InputError(f"{rotary.TRUNCATED} is false, but true in latent attention; leave it out")
    if yarn is None or latent:
        return
    needed = ("rotary_scaling_factor", "original_max_position_embeddings")
    if missing := [name for name in needed if name not in named]:
        raise InputError(f"rope_type is yarn and {', '.join(missing)} not given; set what the model has")
    for name in ("apply_rope_fusion", "rotary_interleaved"):
        if getattr(model, name):
            raise InputError(
                f"{name} is true and rope_type yarn: Megatron-Core would leave out YaRN's scale of attention "
                "or stop; set it to false"
            )


BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")
"""Kinds of load balancing; Megatron-Core takes any other word for none."""


def check_router(config: RunConfig) -> None:
    """Refuse routers and frozen weights that the rest of the model does not fit."""
    model, megatron = config.model, config.model.megatron
    if model.router_network != "linear" and not megatron.get("num_moe_experts"):
        raise InputError(
            f"router_network is {model.router_network}, but the model is dense: it has no routers; leave it "
            "out"
        )
    if (model.router_network == "gelu") is (model.router_width is None):
        raise InputError(
            f"router_width is {model.router_width} with router_network {model.router_network}; a router of "
            "gelu has a width between its matrices, and no other has"
        )
    if model.router_noise is not None and model.router_network != "mlp":
        raise InputError(
            f"router_noise is {model.router_noise} with router_network {model.router_network}, which has no "
            "weights for it; leave out router_noise, or set router_network to mlp"
        )
    kinds = megatron.get("moe_router_load_balancing_type", "aux_loss")
    known = all(kind in BALANCING for kind in (kinds if isinstance(kinds, list) else [kinds]))
    require(known, "model.moe_router_load_balancing_type", kinds, f"one of {', '.join(BALANCING)}")
    rate = megatron.get("moe_router_bias_update_rate")
    if model.freeze_router and megatron.get("moe_router_enable_expert_bias") and rate:
        raise InputError(
            f"freeze_router keeps the routers as they are, their expert bias too, but "
            f"moe_router_bias_update_rate is {rate}; leave it out, or set it to 0"
        )
    if not model.freeze_expert_gate:
        return
    if not (megatron.get("num_moe_experts") and megatron.get("gated_linear_unit")):
        raise InputError(
            "freeze_expert_gate is true, but the model has no experts with a gate projection; leave it out"
        )
    if config.optimizer.weight_decay:
        raise InputError(
            f"freeze_expert_gate keeps the experts' gate projections as they are, but weight_decay "
            f"{config.optimizer.weight_decay} would shrink them; set weight_decay to 0"
        )
    if megatron.get("moe_use_legacy_grouped_gemm"):
        raise InputError(
            "freeze_expert_gate with moe_use_legacy_grouped_gemm, which keeps all experts in one matrix, is "
            "not supported; leave out moe_use_legacy_grouped_gemm"
        )


def check_capacity(config: RunConfig) -> None:
    """Refuse settings of dropped tokens that contradict one another."""
    model = config.model.megatron
    if model.get("moe_expert_capacity_factor") is None:
        return
    if model.get("moe_router_fusion"):
        raise InputError(
            "moe_expert_capacity_factor with moe_router_fusion would count only the tokens that were not "
            "dropped: the fused router does not tell what it chose; leave out moe_router_fusion"
        )
    if config.mixing.load_mass == "probability":
        raise InputError(
            "mixing.load_mass is probability with moe_expert_capacity_factor: the probabilities of dropped "
            "tokens are not known; use load_mass count, or leave out moe_expert_capacity_factor"
        )
