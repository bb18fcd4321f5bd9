"""Whether weights follow from what was measured: the mixing controller, asked again from the records.

Axes: D sources.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_dynmix.config.strategies import is_own
from megatron_dynmix.mixing.controller import ControllerState, Decision, MixingController
from megatron_dynmix.mixing.strategy import Signal
from megatron_dynmix.records.mixing_update import TOLD, signal_of, update_record
from megatron_dynmix.records.schema import MixingUpdate, StageLine
from megatron_dynmix.training.mix_setup import controller_of, for_strategy
from megatron_dynmix.training.source_change import SourceChange
from megatron_dynmix.verify.verdict import TOLERANCE, NotProven

COMPARED = ("distance", "delta", "delta_error", "new_weights", "load")
"""Numbers of an update that its replay gives again."""


class RuleReplay:
    """The controller of a run, from its start on, by the settings and signals on record.

    A strategy of the user's own is not run: its code is not part of the record.
    """

    def __init__(self, start: StageLine, where: str, notes: list[str]) -> None:
        """Choose the first weights again; `NotProven` if they are not those of the first stage.

        What a reader must know is added to `notes`, here and by `check`.
        """
        self._notes = notes
        self._line = start
        self._state: ControllerState | None = None
        self._say_own(start)
        if is_own(start.settings.strategy):
            return
        try:
            controller = self._controller(start, start.begin["weights"])
            ahead: dict[str, Any] = {name: int(start.begin[name]) for name in TOLD if name in start.begin}
            decision = controller.start(Signal(**told_by(start), **ahead))
        except (KeyError, TypeError, ValueError) as error:
            raise NotProven(f"{where}: the first weights cannot be chosen again: {error}") from None
        if not np.abs(decision.weights_D - np.array(start.weights)).max() <= TOLERANCE:
            raise NotProven(
                f"{where}: the first weights are {list(start.weights)}; the settings on record give "
                f"{decision.weights_D.tolist()}"
            )
        self._state = controller.state

    def check(self, update: MixingUpdate, line: StageLine, last: StageLine) -> bool:
        """Ask again for an update, with its arrays, that began stage `line`; return whether it could be.

        `NotProven` if what was measured does not give what is on record.
        """
        where = f"mixing.jsonl, iteration {line.iteration}"
        if update.signal is None:
            unusable = any(note.kind == "override_unusable" for note in update.notes)
            if line.weights != last.weights or not unusable:
                raise NotProven(
                    f"{where}: the weights changed, but nothing is recorded that they could follow from"
                )
            return True
        self._say_own(line)
        if is_own(line.settings.strategy) or self._state is None:
            self._state = None  # nothing that follows is known from the start on
            return False
        try:
            controller = self._controller(line, last.weights)
            state = for_strategy(self._state, self._line.settings.strategy, line.settings.strategy)
            controller.resume(state.at(last.weights))
            decision = controller.update(signal_of(update, **told_by(line)), update.override)
        except (IndexError, TypeError, ValueError) as error:
            raise NotProven(f"{where}: the update cannot be made again: {error}") from None
        _compare(update, decision, controller, line, where)
        self._state, self._line = controller.state, line
        return True

    def change_sources(self, change: SourceChange, line: StageLine) -> None:
        """Go on with other sources, as the run did."""
        if self._state is not None:
            self._state = self._state.with_sources(line.sources, change.kept_D, line.weights)
        self._line = line

    def _say_own(self, line: StageLine) -> None:
        """Note what is not replayed, once: a resumed run may bring other strategies."""
        found = [f"shadow {shadow.label}" for shadow in line.settings.shadows if shadow.own]
        if is_own(line.settings.strategy):
            found.append(f"strategy {line.settings.strategy}")
        for what in found:
            note = f"{what} is the user's own: it was not replayed"
            if note not in self._notes:
                self._notes.append(note)

    def _controller(self, line: StageLine, weights: Any) -> MixingController:
        own = {shadow.label for shadow in line.settings.shadows if shadow.own}
        size_D, weights_D = np.array(line.sizes, np.int64), np.array(weights, np.float64)
        return controller_of(line.settings, line.resolved, line.sources, size_D, weights_D, without=own)


def _compare(
    update: MixingUpdate, decision: Decision, controller: MixingController, line: StageLine, where: str
) -> None:
    """Refuse an update unless the replay gives everything that its record says."""
    size_D, weights_D = np.array(line.sizes), decision.weights_D
    again = update_record(
        controller,
        decision,
        iteration=line.iteration,
        consumed_samples=line.start_sample,
        old_D=weights_D,
        new_D=weights_D,
        tokens_D=size_D,
        rows_D=np.array(line.drawn),
        size_D=size_D,
        seconds={},
    )
    compared = {name: (getattr(update, name), getattr(again, name)) for name in COMPARED}
    shadows = again.shadow.items()
    compared |= {f"shadow {label}": (update.shadow.get(label), weights) for label, weights in shadows}
    for name, (recorded, replayed) in compared.items():
        if not _equal(recorded, replayed):
            raise NotProven(f"{where}: {name} does not follow from the recorded signal and old weights")
    if update.events != again.events:
        recorded, replayed = ([event.text for event in each.events] for each in (update, again))
        raise NotProven(f"{where}: events are {recorded}; guardrails and override do {replayed}")


def told_by(line: StageLine) -> dict[str, Any]:
    """Return what a line of the ledger tells of a signal."""
    return {
        "iteration": line.iteration,
        "size_D": np.array(line.sizes, np.int64),
        "drawn_D": np.array(line.drawn, np.int64),
        "seed": line.seed,
        "same_rows": line.settings.measures_same_rows,
    }


def _equal(recorded: Any, replayed: Any) -> bool:
    if recorded is None or replayed is None:
        return recorded is replayed
    mine, theirs = np.array(replayed, np.float64), np.array(recorded, np.float64)
    return mine.shape == theirs.shape and bool(np.abs(mine - theirs).max() <= TOLERANCE)
