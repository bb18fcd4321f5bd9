"""The mixing section of a RunConfig: how the weights change, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_dynmix.config.strategies import Chosen, chosen_shadow, complete_options, is_own
from megatron_dynmix.config.values import one_of, positive, require
from megatron_dynmix.errors import InputError

SignalName = Literal["probe", "train"]
UnitName = Literal["tokens", "examples"]
LoadTokens = Literal["all", "trained"]
LoadMass = Literal["count", "probability"]
ProbeRows = Literal["fixed", "rotating"]


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How the weights change."""

    strategy: str = "gate-load"
    """A built-in one, or `module:name` of your own."""
    interval: int = 100
    """Iterations between two weight updates (the paper's m)."""
    unit: UnitName = "tokens"
    """What a weight is a share of: the tokens drawn (rows, all equally long), or the examples (the paper)."""
    signal: SignalName = "probe"
    """Where gate loads are measured: on held-out rows, or while training."""
    probe_tokens: int = 16384
    """Positions of each source's held-out rows that a probe reads."""
    probe_rows: ProbeRows = "fixed"
    """Whether every probe reads the same rows, or each goes on where the last one stopped."""
    load_tokens: LoadTokens = "all"
    """Tokens that gate loads are made of: all but padding, or those whose label is trained on."""
    load_mass: LoadMass = "count"
    """What a token adds to the load of an expert it goes to: 1, or the weight its output gets."""
    min_tokens: int = 1
    """Of a source in an interval, for `signal: train`; with fewer its last known values are used."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of a built-in strategy, flat in YAML; those not given are filled in."""
    strategy_options: dict[str, Any] = field(default_factory=dict)
    """Options of a strategy of your own."""
    reference: str | None = None
    """JSON file {source: loss in nats} of a reference model."""
    target: str | None = None
    """JSON file {source: loss in nats} that is aimed at."""
    weights_from: str | None = None
    """Run directory whose last weights are taken."""
    embeddings: str | None = None
    """JSON or .npz file {source: vector}."""
    schedule: tuple[Any, ...] | None = None
    """[[iteration, {source: weight}], ...]."""
    weight_floor: float = 0.0
    """Least weight of a source that is not paused."""
    max_kl_step: float | None = None
    """Longest step of an update, in nats of KL from the old weights to the new."""
    min_entropy: float | None = None
    """Least entropy of the weights, as a share of the uniform mix's."""
    prior: str | dict[str, float] | None = None
    """Weights to be pulled towards: {source: weight}, `size` or `uniform`."""
    prior_pull: float = 0.0
    """How far each update is pulled towards the prior, from 0 to 1."""
    override_file: str | None = None
    """What an operator writes to change or pause sources; `override.json` in the run directory."""
    shadow: tuple[str | dict[str, Any], ...] = ()
    """Strategies that are asked beside it and change nothing: a name, or {strategy: NAME, option: value}."""

    def __post_init__(self) -> None:
        one_of("mixing.signal", self.signal, SignalName)
        one_of("mixing.unit", self.unit, UnitName)
        one_of("mixing.probe_rows", self.probe_rows, ProbeRows)
        one_of("mixing.load_tokens", self.load_tokens, LoadTokens)
        one_of("mixing.load_mass", self.load_mass, LoadMass)
        positive(self, "mixing", "interval", "probe_tokens")
        require(self.min_tokens >= 0, "mixing.min_tokens", self.min_tokens, "0 or more")
        options = complete_options(self.strategy, self.options, "mixing")
        if self.strategy_options and not is_own(self.strategy):
            raise InputError(
                f"mixing.strategy_options are for a strategy of your own (MODULE:NAME), not for "
                f"{self.strategy}; write its options into the mixing section"
            )
        object.__setattr__(self, "options", options)  # frozen: this is the construction
        labels = [shadow.label for shadow in self.shadows]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(f"mixing.shadow holds {label} twice; give each another option, or only one")

    def flat(self) -> dict[str, Any]:
        """As in YAML: the strategy's options beside the other settings."""
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        options = settings.pop("options")
        return {**settings, **options}

    @classmethod
    def from_flat(cls, settings: Mapping[str, Any]) -> MixingConfig:
        """Read `flat` back, from JSON too.

        Raises:
            InputError: a setting that there is not.

        """
        own = {item.name for item in fields(cls)}
        tuples = {name: tuple(settings[name]) for name in ("shadow", "schedule") if settings.get(name)}
        known = {name: value for name, value in settings.items() if name in own}
        options = {name: value for name, value in settings.items() if name not in own}
        return cls(**{**known, **tuples}, options=options)

    @property
    def chosen(self) -> Chosen:
        """The strategy in charge, with its options."""
        own = is_own(self.strategy)
        options = self.strategy_options if own else self.options
        return Chosen(label=self.strategy, strategy=self.strategy, options=options, own=own)

    @property
    def shadows(self) -> list[Chosen]:
        """The strategies beside it."""
        return [chosen_shadow(entry) for entry in self.shadow]
