"""The mixing controller, asked again from a run's records with other settings.

What was measured is what the run measured: a model trained on other weights would have had other losses and
gate loads. How many rows would have been drawn follows from the rule's own weights. Axes: D sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.compare.grid import Variant
from megatron_dynmix.config import leaves
from megatron_dynmix.config.load import parse_flags
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.config.strategies import RESOLVED, is_own, option_hints
from megatron_dynmix.data.blend import Cursor, advance
from megatron_dynmix.errors import CommandFailed, InputError
from megatron_dynmix.mixing.controller import ControllerState, Decision, MixingController
from megatron_dynmix.mixing.strategy import RemarkKind, Signal
from megatron_dynmix.mixing.trajectory import Motion, motion
from megatron_dynmix.records.mixing_update import TOLD, signal_of
from megatron_dynmix.records.schema import StageLine
from megatron_dynmix.training.mix_setup import (
    Resolved,
    controller_of,
    for_strategy,
    refusing,
    resolve_files,
)
from megatron_dynmix.training.source_change import SourceChange
from megatron_dynmix.verify.rule import told_by
from megatron_dynmix.verify.run_records import RunRecords, stage_line
from megatron_dynmix.verify.verdict import TOLERANCE

AS_RUN = "as run"
MEASURED = (
    *("interval", "unit", "signal", "probe_tokens", "probe_rows", "load_tokens", "load_mass", "min_tokens"),
    *("load_routers", "override_file", "shadow"),
)
"""Settings of the mixing section that say what is measured and when, or what is beside the rule."""


@dataclass(frozen=True)
class Rule:
    """What is tried: settings of the mixing section that replace the run's own."""

    name: str
    changes: Mapping[str, Any]

    def __post_init__(self) -> None:
        for setting in self.changes:
            if setting in MEASURED or leaves.find(setting).section != "mixing":
                raise InputError(
                    f"{self.name} sets {setting}, which no rule can change over what is on record; give "
                    "strategies, their options and guardrails only"
                )

    @classmethod
    def of(cls, variant: Variant) -> Rule:
        """Read a rule from the settings of a variant."""
        cls(variant.name, dict(variant.settings))  # refuses by name what is no flag of a rule
        return cls(variant.name, parse_flags(variant.flags(), leaves.mixing_leaves()))

    def settings(self, recorded: MixingConfig) -> MixingConfig:
        """Return the settings of a stage; options that were chosen for another strategy are left out."""
        flat = recorded.flat()
        if self.changes.get("strategy", recorded.strategy) != recorded.strategy:
            flat = {
                name: value
                for name, value in flat.items()
                if name not in (*option_hints(), "strategy_options", "similarity_correction", "begin_with")
            }
        return MixingConfig.from_flat({**flat, **self.changes, "shadow": ()})

    def resolved(self, settings: MixingConfig, line: StageLine) -> Resolved:
        """Return what the settings say by file and source: on record, or read now where they are new."""
        new = [name for name in RESOLVED if name in self.changes]
        old = {name: value for name, value in line.resolved.items() if name not in map(RESOLVED.get, new)}
        only_new: dict[str, Any] = {name: None for name in RESOLVED if name not in new}
        return {**old, **resolve_files(replace(settings, **only_new), line.sources)}


@dataclass(frozen=True, kw_only=True)
class Point:
    """Weights by source that came into force after an iteration."""

    iteration: int
    shares: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The weights that a rule would have given, and what there is to say of them."""

    name: str
    strategy: str
    points: list[Point]
    guarded: int
    """Updates at which guardrails or the operator changed what the strategy proposed."""
    remarks: Mapping[RemarkKind, tuple[str, int]]
    """What kind of thing the rule had to say -> in which words it said it last, and how many times."""

    @property
    def motion(self) -> Motion:
        """How the weights moved."""
        sources = list(dict.fromkeys(name for point in self.points for name in point.shares))
        weights = [[point.shares.get(name, 0.0) for name in sources] for point in self.points]
        return motion([point.iteration for point in self.points], weights)


def run_itself(records: RunRecords) -> tuple[Tried, str]:
    """Return the weights that the run had, and how they compare with those that its settings give again.

    Raises:
        CommandFailed: the settings on record do not give the weights on record.

    """
    lines = _lines(records)
    points = [_point(line.iteration, line.sources, line.weights) for line in lines]
    had = Tried(name=AS_RUN, strategy=lines[0].settings.strategy, points=points, guarded=0, remarks={})
    if any(is_own(line.settings.strategy) for line in lines):
        return (
            had,
            "The run's strategy is code of your own, no part of the record: its weights are as recorded.",
        )
    again = replayed(records, Rule(AS_RUN, {}))
    pairs = zip(had.points, again.points, strict=True)
    off = max(abs(mine.shares[name] - its.shares[name]) for mine, its in pairs for name in mine.shares)
    if off > TOLERANCE:
        raise CommandFailed(
            f"the settings on record do not give the weights on record, a weight is {off:.1e} off: what "
            "other rules would have done cannot be told from these records; `verify` says where they disagree"
        )
    how = "exactly" if off == 0 else f"to {off:.0e}"
    return replace(again, name=AS_RUN), f"The run's own settings, asked again, give its own weights {how}."


def replayed(records: RunRecords, rule: Rule) -> Tried:
    """Ask a rule at every update of a run.

    Raises:
        InputError: the rule cannot be made, or needs what the run did not measure.

    """
    replay = _Replay(records, rule)
    for line in _lines(records):
        replay.go_on(line)
    return replay.tried


class _Replay:
    """Goes from stage to stage of a run's ledger, with weights of its own."""

    def __init__(self, records: RunRecords, rule: Rule) -> None:
        self._records = records
        self._rule = rule
        self._line: StageLine | None = None
        self.tried = Tried(name=rule.name, strategy="", points=[], guarded=0, remarks={})

    def go_on(self, line: StageLine) -> None:
        """Choose the weights of a stage."""
        settings = self._rule.settings(line.settings)
        resolved = self._rule.resolved(settings, line)
        with refusing(settings, self._rule.name, line.sources):
            if line.why == "start":
                decision = self._start(line, settings, resolved)
            elif line.why == "sources changed":
                decision = None
                self._change_sources(line)
            else:
                decision = self._update(line, settings, resolved)
        weights_D = self._state.course.weights_D if decision is None else decision.weights_D
        self._weights_D, self._line = weights_D, line
        point = _point(line.iteration, line.sources, weights_D.tolist())
        remarks = dict(self.tried.remarks)
        for note in decision.notes if decision else ():
            _, times = remarks.get(note.kind, ("", 0))
            remarks[note.kind] = note.text, times + 1
        self.tried = replace(
            self.tried,
            strategy=self.tried.strategy or settings.strategy,
            points=[*self.tried.points, point],
            guarded=self.tried.guarded + bool(decision and decision.events),
            remarks=remarks,
        )

    def _start(self, line: StageLine, settings: MixingConfig, resolved: Resolved) -> Decision:
        self._cursor = Cursor.start(len(line.sources))
        controller = _controller(line, settings, resolved, np.array(line.begin["weights"]))
        told = self._told(line)
        updates = map(self._records.update, sorted(self._records.mixing))
        first = next((update.signal for update in updates if update and update.signal), None)
        if first is not None:
            told |= {name: getattr(first, name) for name in TOLD}
        told |= {name: int(line.begin[name]) for name in TOLD if name in line.begin}
        decision = controller.start(Signal(**told))
        self._state: ControllerState = controller.state
        return decision

    def _update(self, line: StageLine, settings: MixingConfig, resolved: Resolved) -> Decision | None:
        last = self._line
        assert last is not None, "a ledger begins with a start"
        self._cursor = advance(self._cursor, self._weights_D, last.chunk_size, line.start_sample)
        found = self._records.update(line.iteration)
        assert found is not None, "stages without one are left out"
        update = self._records.with_arrays(found)
        if update.signal is None:
            return None
        controller = _controller(line, settings, resolved, self._weights_D)
        controller.resume(
            for_strategy(self._state, self._rule.settings(last.settings).strategy, settings.strategy)
        )
        decision = controller.update(signal_of(update, **self._told(line)), update.override)
        self._state = controller.state
        return decision

    def _change_sources(self, line: StageLine) -> None:
        last = self._line
        assert last is not None, "a ledger begins with a start"
        self._cursor = advance(self._cursor, self._weights_D, last.chunk_size, line.start_sample)
        change = SourceChange.between(last.source_set, line.source_set)
        self._cursor = change.cursor(self._cursor)
        weights_D = change.weights_D(self._weights_D.tolist(), np.array(line.weights))
        self._state = self._state.with_sources(line.sources, change.kept_D, weights_D)

    def _told(self, line: StageLine) -> dict[str, Any]:
        return told_by(line) | {"drawn_D": self._cursor.drawn_D}  # of its own weights, not the run's


def _controller(
    line: StageLine, settings: MixingConfig, resolved: Resolved, weights_D: NDArray[np.float64]
) -> MixingController:
    return controller_of(settings, resolved, line.sources, np.array(line.sizes, np.int64), weights_D)


def _lines(records: RunRecords) -> list[StageLine]:
    """Return the stages of a ledger; `InputError` if it does not begin with one."""
    lines = [
        stage_line(record, f"ledger.jsonl:{number}")
        for number, record in enumerate(records.ledger, start=1)
        if record.get("kind") == "stage"
    ]
    if not lines or lines[0].why != "start":
        raise InputError("ledger.jsonl does not begin with the start of a run: a line is missing")
    return [line for line in lines if line.why != "update" or line.iteration in records.mixing]


def _point(iteration: int, sources: list[str], weights: Any) -> Point:
    return Point(iteration=iteration, shares=dict(zip(sources, weights, strict=True)))
