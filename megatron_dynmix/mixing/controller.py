"""The controller holds the weights of D sources, asks the strategy for new ones and checks its answer."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_dynmix.mixing.guardrails import Guardrails, Override
from megatron_dynmix.mixing.last_known import (
    HALVES,
    LOSS,
    STAND_INS,
    TOKENS,
    Filled,
    LastKnown,
    matched,
    needs,
    waits,
)
from megatron_dynmix.mixing.strategy import Proposal, Remark, Signal, Strategy
from megatron_dynmix.mixing.weights import Floats, check_weights


@dataclass(frozen=True, eq=False)
class Course:
    """Where a strategy stands.

    Attributes:
        weights_D: what it starts its next update from, which need not be what it proposed.
        first_D: what it began the run with; a strategy that never updates stays with them.
        state: `Proposal.state` of its last update.

    """

    weights_D: Floats
    first_D: Floats
    state: Mapping[str, Any] = field(default_factory=dict)

    def start(self, strategy: Strategy, signal: Signal) -> Proposal:
        """Propose the first weights: the strategy's own choice if it starts, otherwise those given."""
        # A strategy that never updates is asked too: it may have to refuse the weights that it is to keep.
        if strategy.starts or not strategy.updates:
            return checked(strategy.propose(self.weights_D, signal, {}), strategy, len(self.weights_D))
        return self._kept(self.weights_D)

    def update(self, strategy: Strategy, signal: Signal, *, known: bool) -> Proposal:
        """Propose the next weights; those it has, unless all that it must know of the sources is `known`."""
        if not strategy.updates:
            return self._kept(self.first_D)
        if not known:
            return self._kept(self.weights_D)
        proposal = strategy.propose(self.weights_D, signal, self.state)
        return checked(proposal, strategy, len(self.weights_D))

    def _kept(self, weights_D: Floats) -> Proposal:
        return Proposal(weights_D=weights_D, delta_D=np.zeros(len(weights_D)), state=self.state)

    def to_json(self) -> dict[str, Any]:
        """Return it in JSON types; reading it gives the same bits back."""
        return {
            "weights": self.weights_D.tolist(),
            "first_weights": self.first_D.tolist(),
            "strategy": self.state,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], num_sources: int) -> "Course":
        """Read what `to_json` gave."""
        return cls(
            check_weights(record["weights"], num_sources),
            check_weights(record["first_weights"], num_sources),
            record["strategy"],
        )


@dataclass(frozen=True, eq=False)
class ControllerState:
    """All that the next update depends on.

    Attributes:
        course: where the strategy stands.
        shadows: where each strategy stands that only watches, by its label.
        known: what was last measured of each source.
        before_pause: shares that paused sources will come back with, in the order of their pauses.

    """

    sources: tuple[str, ...]
    course: Course
    shadows: Mapping[str, Course]
    known: LastKnown
    before_pause: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def beginning(
        cls, sources: Sequence[str], weights_D: ArrayLike, shadows: Iterable[str]
    ) -> "ControllerState":
        """Return the state of a run that has these weights, and has measured nothing."""
        first_D = check_weights(weights_D, len(sources))
        course = Course(first_D, first_D)
        return cls(tuple(sources), course, dict.fromkeys(shadows, course), LastKnown.nothing(sources))

    def at(self, weights_D: ArrayLike) -> "ControllerState":
        """Return the same with other weights in force."""
        weights_D = check_weights(weights_D, len(self.sources))
        return replace(self, course=replace(self.course, weights_D=weights_D))

    def with_new_strategy(self) -> "ControllerState":
        """Return the same for another strategy: it begins at the weights in force, without memories."""
        return replace(self, course=Course(self.course.weights_D, self.course.weights_D))

    def with_sources(
        self, sources: Sequence[str], unchanged_D: Sequence[int | None], weights_D: ArrayLike
    ) -> "ControllerState":
        """Return the state for other sources: strategies begin again, at weights given.

        `unchanged_D` tells which of the old sources each was; None where it is new or its rows changed: what
        is known of these is forgotten.
        """
        begin = ControllerState.beginning(sources, weights_D, ())
        return replace(
            begin,
            known=self.known.with_sources(sources, unchanged_D),
            before_pause={name: share for name, share in self.before_pause.items() if name in sources},
        )

    def to_json(self) -> dict[str, Any]:
        """Return it in JSON types; reading it gives the same bits back."""
        return {
            "sources": list(self.sources),
            **self.course.to_json(),
            **self.known.to_json(),
            "before_pause": self.before_pause,
            "shadows": {name: course.to_json() for name, course in self.shadows.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ControllerState":
        """Read what `to_json` gave."""
        sources = tuple(record["sources"])
        return cls(
            sources,
            Course.from_json(record, len(sources)),
            {name: Course.from_json(course, len(sources)) for name, course in record["shadows"].items()},
            LastKnown.from_json(sources, record),
            dict(record["before_pause"]),
        )


def checked(proposal: Proposal, strategy: Strategy, num_sources: int) -> Proposal:
    """Return the proposal, after all of it was found fit to adopt, record and save; else raise ValueError."""
    if not isinstance(proposal, Proposal):
        raise ValueError(f"strategy {strategy.name} gave {type(proposal).__name__}; it must give a Proposal")
    weights_D = check_weights(proposal.weights_D, num_sources)
    parts: dict[str, Any] = {
        part: _fit(what, getattr(proposal, part), shape, strategy)
        for what, part, shape in (
            ("delta", "delta_D", (num_sources,)),
            ("load", "load_DLE", (num_sources, -1, -1)),
            ("distance", "distance_DD", (num_sources, num_sources)),
            ("delta error", "delta_error_D", (num_sources,)),
        )
    }
    assert parts["delta_D"] is not None, "a proposal has scores"
    _check_state(proposal.state, strategy)
    return replace(proposal, weights_D=weights_D, **parts)


def _fit(what: str, values: ArrayLike | None, shape: tuple[int, ...], strategy: Strategy) -> Floats | None:
    """Return one part of a proposal as an array of that shape, -1 being any length; None stays None."""
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    fits = [need in (-1, size) for size, need in zip(array.shape, shape, strict=False)]
    if array.ndim != len(shape) or not all(fits):
        need = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise ValueError(f"strategy {strategy.name} gave a {what} of shape {array.shape}; need ({need})")
    if not np.isfinite(array).all():
        raise ValueError(f"strategy {strategy.name} gave a NaN or infinite {what}: {array.tolist()}")
    return array


def _check_state(state: Mapping[str, Any], strategy: Strategy) -> None:
    """Refuse now, not at the next checkpoint: a failed save would lose what was trained since the last."""
    try:
        survives = json.loads(json.dumps(state, allow_nan=False)) == state
    except (TypeError, ValueError):
        survives = False
    if not survives:
        raise ValueError(
            f"strategy {strategy.name} wants to remember {state!r}, which JSON does not give back as it is; "
            "use text keys, lists, finite numbers and text"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What came out of one update.

    Attributes:
        weights_D: the weights now in force.
        proposal: what the strategy wanted, before guardrails and override.
        notes: what a reader must know about this update.
        events: what guardrails and override changed.
        shadow: what each strategy that only watches would have in force; those that failed are missing.
        signal: the signal as the strategies saw it, last known values filled in; a source without any has
            counts of 0 and a loss of NaN.

    """

    weights_D: Floats
    proposal: Proposal
    notes: tuple[Remark, ...]
    events: tuple[Remark, ...]
    shadow: Mapping[str, Proposal]
    signal: Signal


class MixingController:
    """Keeps the weights of a run. Holds no clock, rank or file: one rank updates it, the others are told.

    The position of a name in `sources` is its ``dataset_id``. Shadows are strategies by label that are asked
    beside the run's own, each from its own last weights, and change nothing.
    """

    def __init__(
        self,
        sources: Sequence[str],
        weights_D: Floats,
        strategy: Strategy,
        *,
        guardrails: Guardrails | None = None,
        shadows: Mapping[str, Strategy] | None = None,
    ) -> None:
        if not sources or len(set(sources)) < len(sources):
            raise ValueError(f"sources {list(sources)} must be distinct names, at least one")
        self.strategy = strategy
        self.guardrails = guardrails or Guardrails()
        self.guardrails.check(len(sources))
        self.shadows = dict(shadows or {})
        self.state = ControllerState.beginning(sources, weights_D, self.shadows)
        self._needed = needs(strategy).union(*map(needs, self.shadows.values()))
        self.needs_gate_load = TOKENS in self._needed
        self.needs_halves = HALVES in self._needed
        self.needs_loss = LOSS in self._needed

    @property
    def sources(self) -> tuple[str, ...]:
        """D names."""
        return self.state.sources

    @property
    def weights_D(self) -> Floats:
        """Current weights, summing to 1; a read-only array that no later update changes."""
        return self.state.course.weights_D

    @property
    def updates(self) -> bool:
        """Whether `update` has weights to change or a shadow to ask, not counting an override."""
        return self.guardrails.caps or any(
            strategy.updates for strategy in (self.strategy, *self.shadows.values())
        )

    def start(self, signal: Signal, override: Override | None = None) -> Decision:
        """Choose the first weights, before anything is drawn; call it once in a fresh run.

        Strategies that start are asked; for others the weights given stand. Guardrails hold from the first
        row on, but for the KL step: nothing is in force yet that it could be measured from.
        """
        proposal = self.state.course.start(self.strategy, signal)
        weights_D, events = self._guarded(
            replace(self.guardrails, max_kl_step=None), self.weights_D, proposal, signal, override
        )
        shadow, failed = self._ask_shadows(lambda course, strategy: course.start(strategy, signal))
        begun = {
            name: Course(shadowed.weights_D, shadowed.weights_D, shadowed.state)
            for name, shadowed in shadow.items()
        }
        self.state = replace(
            self.state,
            course=Course(weights_D, proposal.weights_D, proposal.state),
            shadows={**self.state.shadows, **begun},
            before_pause=self._shares_before_pause(proposal.weights_D, override),
        )
        return Decision(
            weights_D=weights_D, proposal=proposal, notes=failed, events=events, shadow=shadow, signal=signal
        )

    def update(self, signal: Signal, override: Override | None = None) -> Decision:
        """Ask the strategy for new weights, bring them within the guardrails and adopt them.

        A source that was not measured in the interval is represented by its last known counts or loss. As
        long as there are none, a strategy that needs them keeps its weights, with deltas of 0. The note says
        so. A strategy that never updates is not asked: its first weights are proposed again, so that they
        come back when an override ends. A source comes back from a pause with the share it had.

        A ValueError, by the strategy, its proposal or the guardrails, leaves the controller unchanged.
        """
        known, signal, unmeasured = self._fill(signal)
        course = replace(self.state.course, weights_D=self._with_returned(override))
        with_halves, without = matched(signal)
        proposal = course.update(
            self.strategy,
            with_halves if HALVES in needs(self.strategy) else without,
            known=not waits(self.strategy, unmeasured),
        )
        weights_D, events = self._guarded(self.guardrails, course.weights_D, proposal, signal, override)
        # A shadow's weights are recorded, not how sure they are: most need no halves for that.
        bare = replace(signal, half_counts_HDLE=None)
        shadow, failed = self._ask_shadows(
            lambda course, strategy: course.update(
                strategy,
                with_halves if HALVES in needs(strategy) else bare,
                known=not waits(strategy, unmeasured),
            )
        )
        moved = {
            name: replace(self.state.shadows[name], weights_D=shadowed.weights_D, state=shadowed.state)
            for name, shadowed in shadow.items()
        }
        self.state = replace(
            self.state,
            course=replace(course, weights_D=weights_D, state=proposal.state),
            shadows={**self.state.shadows, **moved},
            known=known,
            before_pause=self._shares_before_pause(course.weights_D, override),
        )
        return Decision(
            weights_D=weights_D,
            proposal=proposal,
            notes=(*self._notes(unmeasured), *proposal.notes, *failed),
            events=events,
            shadow=shadow,
            signal=signal,
        )

    def _fill(self, signal: Signal) -> tuple[LastKnown, Signal, dict[str, Filled]]:
        """Fill in last known values for what the interval did not bring, and say who was not measured."""
        known, unmeasured = self.state.known, {}
        for what in STAND_INS:
            if what not in self._needed:
                continue
            try:
                known, signal, unmeasured[what] = known.fill(what, signal)
            except ValueError:
                # What only shadows need must not stop the run; they refuse it themselves when they are asked.
                if what in needs(self.strategy):
                    raise
        return known, signal, unmeasured

    def _notes(self, unmeasured: Mapping[str, Filled]) -> list[Remark]:
        notes = []
        for what, filled in unmeasured.items():
            if what == HALVES and filled == unmeasured.get(TOKENS):
                continue
            if filled.unknown:
                text = f"weights kept: no {what} measured yet from {', '.join(filled.unknown)}"
                waiting = waits(self.strategy, {what: filled})
                notes.append(Remark("kept", text) if waiting else Remark("shadow_kept", f"shadow {text}"))
            elif filled.stand_ins:
                names = ", ".join(filled.stand_ins)
                text = f"no {what} in this interval, last known {STAND_INS[what]} used: {names}"
                notes.append(Remark("last_known", text))
        return notes

    def _ask_shadows(
        self, ask: Callable[[Course, Strategy], Proposal]
    ) -> tuple[dict[str, Proposal], tuple[Remark, ...]]:
        """Return what the shadows would do, and which of them failed."""
        proposals: dict[str, Proposal] = {}
        failed = []
        for name, strategy in self.shadows.items():
            try:
                proposals[name] = ask(self.state.shadows[name], strategy)
            except Exception as error:  # it may be a user's code, and must not stop the run
                failed.append(Remark("shadow_failed", f"shadow {name} failed: {error}"))
        return proposals, tuple(failed)

    def _guarded(
        self,
        guardrails: Guardrails,
        old_D: Floats,
        proposal: Proposal,
        signal: Signal,
        override: Override | None,
    ) -> tuple[Floats, tuple[Remark, ...]]:
        """Return the weights to adopt, and what was done to the proposal."""
        if override and override.weights is not None:
            shares_D = [override.weights.get(name, 0.0) for name in self.sources]
            said = ", ".join(f"{name} {share:.4g}" for name, share in override.weights.items())
            events = (Remark("override", f"override: weights set to {said}"), *_pauses(override))
            return check_weights(shares_D, len(self.sources)), events
        paused_D = np.array([override is not None and name in override.pause for name in self.sources])
        guarded = guardrails.apply(old_D, proposal.weights_D, signal, paused_D, self.sources)
        return check_weights(guarded.weights_D, len(self.sources)), (*_pauses(override), *guarded.events)

    def _with_returned(self, override: Override | None) -> Floats:
        """Return the weights in force, and in them the old shares of sources whose pause has ended."""
        weights_D = self.weights_D
        # Last paused, first back: this undoes the pauses exactly.
        for name, share in reversed(list(self.state.before_pause.items())):
            if override is None or name not in override.pause:
                weights_D = weights_D * (1 - share)
                weights_D[self.sources.index(name)] = share
        return weights_D

    def _shares_before_pause(self, weights_D: Floats, override: Override | None) -> dict[str, float]:
        """Return the shares that the sources paused now will come back with."""
        paused = override.pause if override else ()
        lasting = {name: share for name, share in self.state.before_pause.items() if name in paused}
        for name in paused:
            if name not in lasting:
                index = self.sources.index(name)
                lasting[name] = float(weights_D[index])
                weights_D = weights_D / max(1 - weights_D[index], np.finfo(np.float64).tiny)
        return lasting

    def resume(self, state: ControllerState) -> None:
        """Resume from the state of a controller with the same sources in the same order; refuse any other.

        A shadow that it did not have begins at its weights.
        """
        if state.sources != self.sources:
            saved, ours = list(state.sources), list(self.sources)
            missing = [name for name in saved if name not in ours]
            added = [name for name in ours if name not in saved]
            change = f"no longer there {missing}, new {added}" if missing or added else "the order changed"
            raise ValueError(
                f"the saved mix has sources {saved}, this run has {ours}: {change}; "
                "resume with the same sources in the same order"
            )
        new = Course(state.course.weights_D, state.course.weights_D)
        self.state = replace(state, shadows={name: state.shadows.get(name, new) for name in self.shadows})


def _pauses(override: Override | None) -> tuple[Remark, ...]:
    if override is None or not override.pause:
        return ()
    return (Remark("override", f"override: {', '.join(override.pause)} paused"),)
