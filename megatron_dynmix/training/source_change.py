"""Going on with other data: the state of a run, carried over to a changed set of sources.

Pure: plain values and NumPy in and out. Axes: H halves, D sources, L MoE layers, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_dynmix.data.blend import Cursor, advance
from megatron_dynmix.data.source_set import Prints, SourceSet
from megatron_dynmix.mixing.controller import ControllerState


def differences(before: Prints, after: Prints) -> list[str]:
    """What changed from one set of sources to another, a clause each; empty if they are the same."""
    removed, added = [n for n in before if n not in after], [n for n in after if n not in before]
    common = [name for name in after if name in before]
    changed = [name for name in common if list(before[name]) != list(after[name])]
    found = [f"{name} was removed" for name in removed]
    for name in added:
        twins = [old for old in removed if list(before[old]) == list(after[name])]
        found.append(f"{name} is new" + (f" (it holds what {twins[0]} held)" if twins else ""))
    if changed:
        found.append(f"the data, tokenizer or template of {', '.join(changed)} changed")
    if common != [name for name in before if name in after]:
        found.append(f"the order was {', '.join(before)} and is {', '.join(after)}")
    return found


@dataclass(frozen=True, kw_only=True)
class SourceChange:
    """From the sources of a state to those it is to go on with."""

    before: SourceSet
    after: SourceSet
    old_index_D: tuple[int | None, ...]
    """Which source of `before` has the same name."""
    unchanged_D: tuple[bool, ...]
    """Whether it holds the same rows too."""

    @classmethod
    def between(
        cls, before: SourceSet, names: Sequence[str], fingerprints: Sequence[str], sizes: Sequence[int]
    ) -> SourceChange:
        """Compare by name and fingerprint; sources that are not as they were get shuffles of their own."""
        old_index_D = tuple(before.names.index(name) if name in before.names else None for name in names)
        unchanged_D = tuple(
            old is not None and before.fingerprints[old] == now
            for old, now in zip(old_index_D, fingerprints, strict=True)
        )
        fresh = iter(range(max(before.shuffle_ids) + 1, max(before.shuffle_ids) + 1 + len(names)))
        shuffle_ids = tuple(
            before.shuffle_ids[old] if old is not None and unchanged else next(fresh)
            for old, unchanged in zip(old_index_D, unchanged_D, strict=True)
        )
        after = SourceSet(
            names=tuple(names),
            fingerprints=tuple(fingerprints),
            sizes=tuple(sizes),
            shuffle_ids=shuffle_ids,
        )
        return cls(before=before, after=after, old_index_D=old_index_D, unchanged_D=unchanged_D)

    def by_name(self, values_D: Sequence[Any], new: Any) -> list[Any]:
        """Values of the sources of the same name, `new` for new ones."""
        return [copy.deepcopy(new) if old is None else values_D[old] for old in self.old_index_D]

    def if_unchanged(self, values_D: Sequence[Any], new: Any) -> list[Any]:
        """Values of the sources that are as they were, `new` for all others."""
        named = zip(self.by_name(values_D, new), self.unchanged_D, strict=True)
        return [value if unchanged else copy.deepcopy(new) for value, unchanged in named]

    def cursor(self, cursor: Cursor) -> Cursor:
        """Where the sources stand: unchanged ones where they stood, all others at their first row."""
        return Cursor(
            cursor.sample,
            np.array(self.if_unchanged(cursor.drawn_D.tolist(), 0), np.int64),
            np.array(self.if_unchanged(cursor.owed_D.tolist(), 0.0), np.float64),
        )

    def weights_D(self, old_D: Sequence[float], initial_D: NDArray[np.float64]) -> NDArray[np.float64]:
        """New sources get their initial share; the others share the rest in the proportion they had."""
        new_D = np.array([old is None for old in self.old_index_D])
        kept_D = np.array(self.by_name(old_D, 0.0), np.float64)
        rest = 1 - initial_D[new_D].sum()
        if not kept_D.any() or rest <= 0:  # nothing has a share to keep, or there is none left for it
            return initial_D.copy()
        weights_D = np.where(new_D, initial_D, kept_D * (rest / kept_D.sum()))
        return np.asarray(weights_D / weights_D.sum())

    def describe(self, old_D: Sequence[float], weights_D: Sequence[float], cursor: Cursor) -> list[str]:
        """What becomes of each source, a line each, for the log and the ledger."""
        lines = []
        for d, (name, size) in enumerate(zip(self.after.names, self.after.sizes, strict=True)):
            old = self.old_index_D[d]
            share = f"weight {weights_D[d]:.6f}"
            if old is None:
                lines.append(f"{name}: new, {size} rows, {share}")
                continue
            share = f"weight {old_D[old]:.6f} -> {weights_D[d]:.6f}"
            if self.unchanged_D[d]:
                epoch, row = divmod(int(cursor.drawn_D[d]), size)
                lines.append(f"{name}: as it was, goes on after {row} rows of epoch {epoch}, {share}")
            else:
                rows = f"{self.before.sizes[old]} -> {size} rows"
                lines.append(f"{name}: changed, {rows}, from the first row on, {share}")
        gone = [name for name in self.before.names if name not in self.after.names]
        return lines + [f"{name}: removed" for name in gone]

    def carry_controller(self, state: ControllerState, weights_D: ArrayLike) -> ControllerState:
        """Return the mixing controller's state for the sources of `after`."""
        pairs = zip(self.old_index_D, self.unchanged_D, strict=True)
        kept_D = [old if unchanged else None for old, unchanged in pairs]
        return state.with_sources(self.after.names, kept_D, weights_D)

    def carry(
        self, state: Mapping[str, Any], initial_D: NDArray[np.float64]
    ) -> tuple[dict[str, Any], list[str]]:
        """The run state of a checkpoint for the sources of `after`, and what was done, line by line.

        Losses and tokens of the log interval in hand go by name: those of removed sources leave with them.

        Args:
            state: run state of the checkpoint; not changed.
            initial_D: shares that the sources would begin a run with.

        """
        mixing, blend = state["mixing"], state["mixing"]["blend"]
        old_D = blend["stages"][-1][1]
        saved = Cursor.of_state(blend)
        stood = advance(saved, np.array(old_D), blend["chunk_size"], state["consumed_samples"])
        cursor, weights_D = self.cursor(stood), self.weights_D(old_D, initial_D)
        counts_LHDE = [
            [self.if_unchanged(counts_DE, np.zeros_like(counts_DE[0]).tolist()) for counts_DE in counts_HDE]
            for counts_HDE in mixing["interval_counts"]
        ]
        carried_blend = {
            **blend,
            "sizes": list(self.after.sizes),
            "shuffle_ids": list(self.after.shuffle_ids),
            "stages": [*blend["stages"], [cursor.sample, weights_D.tolist()]],
            "chunk_start": cursor.sample,
            "drawn": cursor.drawn_D.tolist(),
            "owed": cursor.owed_D.tolist(),
        }
        log_interval = {
            **state["log_interval"],
            "stats": [self.by_name(sum_D, 0.0) for sum_D in state["log_interval"]["stats"]],
        }
        carried = {
            **state,
            "tokens": self.by_name(state["tokens"], 0.0),
            "log_interval": log_interval,
            "mixing": {
                **mixing,
                "blend": carried_blend,
                "controller": self.carry_controller(
                    ControllerState.from_json(mixing["controller"]), weights_D
                ).to_json(),
                "interval_counts": counts_LHDE,
                "interval_stats": [self.if_unchanged(sum_D, 0.0) for sum_D in mixing["interval_stats"]],
            },
        }
        return carried, self.describe(old_D, weights_D.tolist(), cursor)
