"""Training on with other data: the state of a run, carried over to a changed set of sources.

Pure: no files, no ranks. Axes: D sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from megatron_dynmix.checkpoint.run_state import RunState
from megatron_dynmix.data.blend import Cursor
from megatron_dynmix.data.source_set import Prints, SourceSet
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.mixing.controller import ControllerState


def differences(before: Prints, after: Prints) -> list[str]:
    """Say what changed from one set of sources to another, a clause each; nothing if they are the same."""
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
    """The change from the sources of a state to those that it continues with."""

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

    @property
    def kept_D(self) -> tuple[int | None, ...]:
        """Which source of `before` each one is, if it is as it was."""
        pairs = zip(self.old_index_D, self.unchanged_D, strict=True)
        return tuple(old if unchanged else None for old, unchanged in pairs)

    def by_name(self, values: ArrayLike, *, axis: int = -1) -> NDArray[Any]:
        """Return values of the sources of the same name, 0 for new ones."""
        return _moved(values, self.old_index_D, axis)

    def if_unchanged(self, values: ArrayLike, *, axis: int = -1) -> NDArray[Any]:
        """Return values of the sources that are as they were, 0 for all others."""
        return _moved(values, self.kept_D, axis)

    def cursor(self, cursor: Cursor) -> Cursor:
        """Return where the sources stand: unchanged ones where they stood, all others at their first row."""
        return Cursor(cursor.sample, self.if_unchanged(cursor.drawn_D), self.if_unchanged(cursor.owed_D))

    def weights_D(self, old_D: Sequence[float], initial_D: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give new sources their initial share; the others share the rest in the proportion they had."""
        new_D = np.array([old is None for old in self.old_index_D])
        kept_D = self.by_name(old_D)
        rest = 1 - initial_D[new_D].sum()
        if not kept_D.any() or rest <= 0:  # nothing has a share to keep, or there is none left for it
            return initial_D.copy()
        weights_D = np.where(new_D, initial_D, kept_D * (rest / kept_D.sum()))
        return np.asarray(weights_D / weights_D.sum())

    def describe(self, old_D: Sequence[float], weights_D: Sequence[float], cursor: Cursor) -> list[str]:
        """Say what becomes of each source, a line each, for the log and the ledger."""
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
        return state.with_sources(self.after.names, self.kept_D, weights_D)

    def carry(self, state: RunState, initial_D: NDArray[np.float64]) -> tuple[RunState, list[str]]:
        """Return the state for the sources of `after`, and what was done, line by line.

        Losses and tokens of the log interval in hand go by name: those of removed sources leave with them.

        Args:
            state: run state of the checkpoint.
            initial_D: shares that the sources would begin a run with.

        """
        mix, blend, log = state.mix, state.mix.blend, state.log_interval
        old_D = blend.stages[-1].weights
        cursor = self.cursor(blend.cursor_at(state.progress.consumed_samples))
        weights_D = self.weights_D(old_D, initial_D)
        tokens_D = torch.from_numpy(self.by_name(state.progress.tokens_D))
        counts = mix.interval_counts  # of a dense model there are none, and no axes
        carried = replace(
            state,
            progress=replace(state.progress, tokens_D=tokens_D),
            log_interval=replace(log, stats=SourceStats.of(self.by_name(log.stats.sums))),
            mix=replace(
                mix,
                blend=blend.with_sources(self.after.sizes, self.after.shuffle_ids, cursor, weights_D),
                controller=self.carry_controller(mix.controller, weights_D),
                interval_counts=self.if_unchanged(counts, axis=-2) if counts.size else counts,
                interval_stats=SourceStats.of(self.if_unchanged(mix.interval_stats.sums)),
            ),
        )
        return carried, self.describe(old_D, weights_D.tolist(), cursor)


def _moved(values: ArrayLike, old_index_D: Sequence[int | None], axis: int) -> NDArray[Any]:
    """Return the values of the sources with these indices along an axis; 0 where there is none."""
    array = np.moveaxis(np.asarray(values), axis, 0)
    moved = np.zeros((len(old_index_D), *array.shape[1:]), array.dtype)
    for new, old in enumerate(old_index_D):
        if old is not None:
            moved[new] = array[old]
    return np.moveaxis(moved, 0, axis)
