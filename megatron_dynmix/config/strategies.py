"""The options of the mixing strategies as settings: which there are, and which strategy has which."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.strategies import STRATEGIES, build_strategy

RESOLVED = {
    "reference": "reference_D",
    "target": "target_D",
    "weights_from": "weights_D",
    "embeddings": "embeddings_DV",
    "schedule": "points",
    "sizes": "sizes_D",
    "prior": "prior_D",
    "match": "target_source",
}
"""Settings that name a file, or values by source -> the option of a strategy that is made of them."""
RESOLVED_FROM = {
    "reference": "a JSON file {source: loss of a reference model}",
    "target": "a JSON file {source: loss that is aimed at}",
    "weights_from": "the directory of a run with weight updates, or a JSON file {source: weight}",
    "embeddings": "a JSON or .npz file {source: vector}",
    "schedule": "[[iteration, {source: weight}], ...]",
    "sizes": "{source: size}",
    "match": "the name of the source whose load is to be matched",
}
"""What is to be given for them, which is said where one is missing or no strategy reads it."""


def is_own(strategy: str) -> bool:
    """Tell whether it is a user's own: `module:name`."""
    return ":" in strategy


def option_hints() -> dict[str, Any]:
    """Return every flat option of the mixing section, of any built-in strategy -> its type."""
    return {
        field.name: typing.get_type_hints(kind)[field.name]
        for kind in STRATEGIES.values()
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.name not in RESOLVED.values()
    }


def option_defaults(strategy: str) -> dict[str, Any]:
    """Return the flat options of a strategy -> their published defaults; none of a user's own."""
    if is_own(strategy):
        return {}
    fields = dataclasses.fields(STRATEGIES[strategy])  # type: ignore[arg-type]
    return {field.name: field.default for field in fields if field.name not in RESOLVED.values()}


def resolved_options(strategy: str) -> dict[str, bool]:
    """Return the settings of `RESOLVED` that a strategy uses -> whether it cannot do without."""
    if is_own(strategy):
        return {}
    fields = {field.name: field for field in dataclasses.fields(STRATEGIES[strategy])}  # type: ignore[arg-type]
    return {
        setting: fields[option].default is dataclasses.MISSING
        for setting, option in RESOLVED.items()
        if option in fields
    }


def complete_options(strategy: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options given, and the published defaults of all others; `where` begins a refusal."""
    if not is_own(strategy) and strategy not in STRATEGIES:
        names = ", ".join(STRATEGIES)
        raise InputError(
            f"{where}.strategy is {strategy!r}; it must be one of {names}, or MODULE:NAME of your own"
        )
    defaults = option_defaults(strategy)
    for name in given:
        if name in defaults:
            continue
        if is_own(strategy):
            raise InputError(
                f"{where}.{name} is an option of built-in strategies, {strategy} is your own; put its "
                f"options under {where}.strategy_options"
            )
        if name in RESOLVED:
            raise InputError(f"{where}: {name} is shared: give it as mixing.{name}, for all strategies")
        having = [other for other in STRATEGIES if name in option_defaults(other)]
        raise InputError(
            f"{where}.{name} is no option of strategy {strategy}, which has "
            f"{', '.join(defaults) or 'none'}; leave it out, or use a strategy that has it: "
            f"{', '.join(having) or 'none does'}"
        )
    return {**defaults, **given}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """A strategy with its options, as a configuration names it."""

    label: str
    """In records and tags; tells two choices of one strategy apart."""
    strategy: str
    options: Mapping[str, Any]
    own: bool
    corrected: bool = False
    """Whether its weights are corrected for sources that are alike."""
    begin: Chosen | None = None
    """What chooses its first weights; None if nothing else does."""

    @property
    def kind(self) -> Any:
        """What has the strategy's parts: its class, or an object of a user's own."""
        if not self.own:
            return STRATEGIES[self.strategy]
        try:
            return build_strategy(self.strategy, self.options)
        except ValueError as error:
            raise InputError(f"mixing: {error}") from None

    @property
    def needs(self) -> tuple[bool, bool]:
        """Whether gate loads, and whether losses, must be measured for it."""
        kind = self.kind
        return self.corrected or kind.needs_gate_load, kind.needs_loss


def check_given(chosen: Chosen, given: Collection[str]) -> None:
    """Refuse a strategy without a setting that it cannot do without; those of `RESOLVED_FROM` are given."""
    for setting, required in resolved_options(chosen.strategy).items():
        if required and setting not in given:
            flag = setting.replace("_", "-")
            raise InputError(
                f"strategy {chosen.label} needs mixing.{setting} (--{flag}): {RESOLVED_FROM[setting]}"
            )


def chosen_shadow(entry: str | Mapping[str, Any]) -> Chosen:
    """Read one entry of `mixing.shadow`, or raise InputError."""
    shadow = _named(entry, "mixing.shadow")
    if not shadow.own and not shadow.kind.updates:
        raise InputError(
            f"mixing.shadow {shadow.strategy} never changes weights, so there is nothing to watch; leave it "
            "out"
        )
    return shadow


def chosen_begin(entry: str | Mapping[str, Any], strategy: Chosen) -> Chosen:
    """Read `mixing.begin_with`, for a strategy that others may begin for, or raise InputError."""
    begin = _named(entry, "mixing.begin_with")
    if strategy.kind.starts or not strategy.kind.updates:
        raise InputError(
            f"mixing.begin_with is {begin.label}, but strategy {strategy.label} has first weights of its "
            "own; leave one of them out"
        )
    if not begin.kind.starts or any(begin.needs):
        able = [name for name, kind in STRATEGIES.items() if kind.starts and not kind.needs_gate_load]
        raise InputError(
            f"mixing.begin_with is {begin.label}, which has no weights before anything is measured; give one "
            f"of {', '.join(able)}"
        )
    return begin


def _named(entry: str | Mapping[str, Any], setting: str) -> Chosen:
    """Read a strategy that a setting beside `mixing.strategy` names."""
    given = {"strategy": entry} if isinstance(entry, str) else dict(entry)
    strategy = given.pop("strategy", None)
    if not isinstance(strategy, str):
        raise InputError(
            f"{setting} holds {entry!r}; give the name of a strategy, or {{strategy: NAME, option: value}}"
        )
    own = is_own(strategy)
    options = given if own else complete_options(strategy, given, f"{setting} {strategy}")
    label = ",".join([strategy, *(f"{name}={value}" for name, value in given.items())])
    return Chosen(label=label.replace(",", ":", 1), strategy=strategy, options=options, own=own)
