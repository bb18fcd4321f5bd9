"""What config.json says of the rotary embedding <-> our settings of it.

Source: `transformers`' modeling_rope_utils, Megatron-Core's `YarnRotaryEmbedding` and `MLATransformerConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_dynmix.config.megatron_fields import megatron_fields
from megatron_dynmix.errors import InputError

Values = Mapping[str, Any]

YARN = {
    "rotary_scaling_factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""Our name, which is that of `MLATransformerConfig` -> theirs, of an embedding stretched by YaRN."""
TRUNCATED = "yarn_correction_range_round_to_int"
INTERPOLATED = "rotary_seq_len_interpolation_factor"
SHARE, PARTIAL = "rotary_percent", "partial_rotary_factor"
"""Our name and theirs of the share of each head that is rotated."""
SETTINGS = ("rotary_base", SHARE, "rope_type", *YARN, TRUNCATED, INTERPOLATED)
"""All our settings of the embedding."""
WORDS = (
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *(PARTIAL, "rotary_dim"),
)
"""All that config.json says of it."""
OTHERS = ("type", "rope_type", "rope_theta", PARTIAL, "attention_factor", "truncate")
"""What `rope_scaling` may say of YaRN beside `YARN`."""


def rotary_settings(config: Values, *, latent: bool, partial: bool = False) -> dict[str, Any]:
    """Return our settings for a config.json that says `rope_theta`.

    `latent` is for multi-latent attention, `partial` for a family that may rotate a part of each head. As
    transformers 5 has it, `rope_scaling` is taken for `rope_parameters` where both are given.
    """
    rope = _parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    settings: dict[str, Any] = {
        "rotary_base": float(_positive("rope_theta", rope["rope_theta"])),
        SHARE: _share(rope, config, partial),
    }
    if kind == "yarn":
        return settings | {"rope_type": "yarn", **_yarn(rope, config, latent)}
    if kind == "linear" and not latent:
        return settings | {INTERPOLATED: float(_positive("factor of rope_scaling", rope.get("factor")))}
    if kind != "default":
        raise InputError(
            f"rope_scaling is of type {kind}; only a rotary embedding of type default"
            f"{'' if latent else ', linear'} or yarn can be run here"
        )
    return settings | ({"rope_type": "rope"} if latent else {})


def in_config(settings: Values) -> dict[str, Any]:
    """Return what config.json says of our settings, in words of transformers 4, which 5 takes too."""
    said: dict[str, Any] = {"rope_theta": settings["rotary_base"]}
    if (yarn := yarn_of(settings)) is not None:
        rope = {theirs: yarn[ours] for ours, theirs in YARN.items()}
        factor, mscale, part = (rope[name] for name in ("factor", "mscale", "mscale_all_dim"))
        if mscale != 1 and not (mscale and part):  # transformers takes both or neither
            rope["attention_factor"] = _scale(factor, mscale) / _scale(factor, part)
        rope |= {} if settings.get(TRUNCATED, True) else {"truncate": False}
        said["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **rope}
    elif factor := settings.get(INTERPOLATED):
        said["rope_scaling"] = {"type": "linear", "rope_type": "linear", "factor": factor}
    return said


def yarn_of(settings: Values) -> dict[str, Any] | None:
    """Return what the `model` section says of YaRN, Megatron-Core's defaults filled in; None without it."""
    fields = megatron_fields()["MLATransformerConfig"]
    usual = fields["rope_type"].default if settings.get("multi_latent_attention") else "rope"
    if settings.get("rope_type", usual) != "yarn":
        return None
    return {ours: settings.get(ours, fields[ours].default) for ours in YARN}


def _parameters(config: Values) -> dict[str, Any]:
    """Return what transformers 5 would have as `rope_parameters`."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"{name} is {config[name]!r}; it must hold settings by name")
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if nested := [name for name, value in given.items() if isinstance(value, dict)]:
        raise InputError(
            f"the rotary embedding is told of {', '.join(nested)} apart; only one for all layers can be run "
            "here"
        )
    return {"rope_theta": config["rope_theta"], **given}


def _share(rope: Values, config: Values, partial: bool) -> float:
    """Return the share of each head that is rotated; what `rope_parameters` says of it holds."""
    share = rope[PARTIAL] if PARTIAL in rope else config.get(PARTIAL)
    share = 1.0 if share is None and PARTIAL not in rope else _positive(PARTIAL, share)
    if share > 1 or (share < 1 and not partial):
        only = "at most 1.0 means something" if partial else "only 1.0 can be run here"
        raise InputError(f"{PARTIAL} is {share!r}, and {only}")
    return float(share)


def _yarn(rope: Values, config: Values, latent: bool) -> dict[str, Any]:
    """Return our settings of a rotary embedding stretched by YaRN."""
    if unknown := sorted(name for name in rope.keys() - {*YARN.values(), *OTHERS} if rope[name] is not None):
        name = unknown[0]
        raise InputError(f"rope_scaling says {name} {rope[name]!r}, which Megatron-Core does not have")
    if "factor" not in rope:
        raise InputError("rope_scaling is of type yarn and says no factor; add it to config.json")
    name, longest = "original_max_position_embeddings", config["max_position_embeddings"]
    original = _positive(name, config[name] if name in config else rope.get(name, longest))
    factor = longest / original if rope["factor"] is None else rope["factor"]
    settings = {
        "rotary_scaling_factor": _positive("factor of rope_scaling", factor),
        "original_max_position_embeddings": original,
        "beta_fast": _positive("beta_fast", rope.get("beta_fast") or 32),
        "beta_slow": _positive("beta_slow", rope.get("beta_slow") or 1),
        **_attention(rope, factor, latent),
    }
    truncate = rope.get("truncate", True)
    if truncate not in (None, True, False) or (latent and not truncate):
        only = "true can be run here" if latent else "true and false mean something"
        raise InputError(f"rope_scaling says truncate {truncate!r}, and only {only}")
    return settings | ({} if truncate else {TRUNCATED: False})


def _attention(rope: Values, factor: float, latent: bool) -> dict[str, Any]:
    """Return `mscale` and `mscale_all_dim` with which Megatron-Core scales attention as transformers does.

    That takes both where both are said, else what follows from the factor, or `attention_factor` instead of
    either; and latent attention is scaled by `mscale_all_dim` once more.
    """
    mscale, part = (rope.get(name) or 0.0 for name in ("mscale", "mscale_all_dim"))
    _number("mscale", mscale), _number("mscale_all_dim", part)
    wanted = rope.get("attention_factor")
    if wanted is None and mscale and part:
        return {"mscale": mscale, "mscale_all_dim": part}
    wanted = _scale(factor) if wanted is None else _number("attention_factor", wanted)
    part = part if latent else 0.0
    mscale = 1.0
    if wanted * _scale(factor, part) != _scale(factor):
        if factor <= 1:
            raise InputError(
                f"rope_scaling says attention_factor {wanted} and factor {factor}; it must be 1 then, as "
                "Megatron-Core scales attention for a factor above 1 alone"
            )
        mscale = (wanted * _scale(factor, part) - 1) / (0.1 * math.log(factor))
    return {"mscale": mscale, "mscale_all_dim": part}


def _scale(factor: float, mscale: float = 1.0) -> float:
    """Return by how much YaRN scales attention for a factor."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}; it must be a number")
    return value


def _positive(name: str, value: Any) -> Any:
    if _number(name, value) <= 0:
        raise InputError(f"{name} is {value!r}; it must be a number above 0")
    return value
