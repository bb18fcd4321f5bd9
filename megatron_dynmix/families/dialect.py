"""What a dialect of config.json is: how one family of Hugging Face models says what our settings say.

`config/hugging_face.py` reads and writes config.json by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_dynmix.errors import InputError

Values = Mapping[str, Any]

NAMES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "moe_router_topk": "num_experts_per_tok",
    "layernorm_epsilon": "rms_norm_eps",
}
"""Our name -> that in config.json, for what every family has."""
QWEN_EXPERTS = {"num_moe_experts": "num_experts", "moe_ffn_hidden_size": "moe_intermediate_size"}
PRE_SOFTMAX = {"moe_router_pre_softmax": ("norm_topk_prob", True)}
"""Weights of the chosen experts that sum to 1 are a softmax over these alone, taken after the choice."""


class Only(NamedTuple):
    """The one value of a setting of theirs that can be run here."""

    value: Any
    why: str
    """What speaks against the others, as the end of a sentence."""


UNBIASED = Only(False, "projections of attention have no biases here")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How config.json of one family says what our settings say."""

    architecture: str
    names: Mapping[str, str]
    """Our name -> theirs, beside `NAMES`."""
    switches: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    """Our switch -> (theirs, whether ours is the opposite)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that all models of the family have."""
    must: Mapping[str, Only] = field(default_factory=dict)
    """Their settings that we can run with one value only; that is meant too if neither config.json nor its
    defaults say anything."""
    rotary: bool = True
    """Whether positions are told by a rotary embedding."""
    mixed: bool = False
    """Whether layers can be dense: `decoder_sparse_step` and `mlp_only_layers`."""
    windows: bool = False
    """Whether `own` reads which layers look back no further than a window; in other families none may."""
    alias: str | None = None
    """The `model_type` under which `transformers` has such models, if that is another."""
    defaults: Values | None = None
    """What they mean by not saying it, if `transformers` has no such models."""
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` is followed: `transformers` reads past it in the other families."""
    plain: Callable[[Values], dict[str, Any]] = dict
    """Their config.json in the words of the other families."""
    own: Callable[[Values], dict[str, Any]] = lambda config: {}
    """Settings that only this family has words for."""
    published: Callable[[Values, Values], dict[str, Any]] = lambda config, settings: dict(config)
    """Their own words again, from config.json and the settings it was made from."""


def require_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse a value that is no whole number, or less than `least`."""
    if type(value) is not int or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number, {least} or more")
