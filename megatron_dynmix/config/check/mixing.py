"""What strategies need of sources, model and files."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dynmix.config.megatron_fields import model_settings, moe_layers
from megatron_dynmix.config.run_config import MixingConfig, RunConfig
from megatron_dynmix.config.strategies import RESOLVED_FROM, Chosen, check_given, resolved_options
from megatron_dynmix.errors import InputError

BY_DISTANCE, MIN_SOURCES = ("gate-load", "inverse"), 3
"""Strategies whose scores are equal where there are two sources, and the sources that they need."""


def check_mixing(config: RunConfig) -> None:
    """Refuse a mix that these sources and this model cannot have."""
    mixing, sources, layers = config.mixing, config.data.sources, moe_layers(model_settings(config))
    if mixing.strategy == "uniform" and len({source.weight for source in sources.values()}) > 1:
        raise InputError("mixing.strategy is uniform, but the sources have different weights; use fixed")
    unprobed = [name for name in sources if name not in config.data.probed]
    check_strategies(mixing, list(sources), layers, unprobed)


def check_strategies(
    mixing: MixingConfig, sources: Sequence[str], moe_layers: list[int] | None, unprobed: Sequence[str] = ()
) -> None:
    """Refuse strategies that cannot work with these sources and layers, None if those are not known yet.

    The `unprobed` sources have no held-out rows.
    """
    _check_signal(mixing, mixing.chosen, "mixing.strategy is", sources, moe_layers, unprobed)
    for shadow in mixing.shadows:
        _check_signal(mixing, shadow, "mixing.shadow has", sources, moe_layers, unprobed)
    _check_resolved(mixing)


def _check_signal(
    mixing: MixingConfig,
    chosen: Chosen,
    what: str,
    sources: Sequence[str],
    layers: list[int] | None,
    unprobed: Sequence[str],
) -> None:
    """Refuse a strategy that reads what cannot be measured."""
    needs_gate_load, needs_loss = chosen.needs
    if needs_gate_load and layers == []:
        raise InputError(
            f"{what} {chosen.label}, but the model is dense: it has no gates to read; set "
            "num_moe_experts, or use strategy uniform or fixed"
        )
    if chosen.strategy in BY_DISTANCE and len(sources) < MIN_SOURCES:
        raise InputError(
            f"{what} {chosen.label} with {len(sources)} source{'s' * (len(sources) > 1)}; it needs "
            f"{MIN_SOURCES}: two are always equally far apart, so their weights never change; add a source, "
            "or use strategy fixed"
        )
    if chosen.strategy == "match-load":
        _check_target(mixing)
    if (needs_gate_load or needs_loss) and mixing.signal == "probe" and unprobed:
        raise InputError(
            f"{what} {chosen.label} and mixing.signal probe, but source {unprobed[0]} has no probe; add "
            f"data.sources.{unprobed[0]}.probe (held-out rows of the same kind), hold some out with "
            "data.probe (--probe), or use signal train"
        )


def _check_target(mixing: MixingConfig) -> None:
    """Refuse what would draw the target of match-load, or leave it unmeasured."""
    if mixing.signal == "train":
        raise InputError(
            "match-load never draws its target, so mixing.signal train would not measure it; use signal probe"
        )
    for setting in ("weight_floor", "min_entropy", "prior_pull"):
        if mixing.strategy == "match-load" and getattr(mixing, setting):
            raise InputError(
                f"mixing.{setting} would draw the target of match-load, which is there to be measured; leave "
                "it out"
            )


def _check_resolved(mixing: MixingConfig) -> None:
    """Refuse a setting that a strategy needs and lacks, and one that no strategy reads."""
    used: set[str] = set()
    given = [setting for setting in RESOLVED_FROM if getattr(mixing, setting) is not None]
    for chosen in mixing.asked:
        used |= resolved_options(chosen.strategy).keys()
        check_given(chosen, given)
    for setting in given:
        if setting not in used:
            raise InputError(
                f"mixing.{setting} is given ({RESOLVED_FROM[setting]}), but strategy {mixing.strategy} does "
                "not read it; leave it out"
            )
