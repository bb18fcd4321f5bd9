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
from megatron_dynmix.data.source_set import SourceSet
from megatron_dynmix.data.source_stats import SourceStats


@dataclass(frozen=True, kw_only=True)
class SourceChange:
    """The change from the sources of a state to those that it continues with."""

    before: SourceSet
    after: SourceSet
    named_D: tuple[int | None, ...]
    """Which source of `before` has the same name."""
    kept_D: tuple[int | None, ...]
    """The same, where it holds the same rows too."""

    @classmethod
    def between(cls, before: SourceSet, after: SourceSet) -> SourceChange:
        """Compare by name and fingerprint."""
        named_D = tuple(before.names.index(name) if name in before.names else None for name in after.names)
        kept_D = tuple(
            old if old is not None and before.fingerprints[old] == now else None
            for old, now in zip(named_D, after.fingerprints, strict=True)
        )
        return cls(before=before, after=after, named_D=named_D, kept_D=kept_D)

    def cursor(self, cursor: Cursor) -> Cursor:
        """Return where the sources stand: unchanged ones where they stood, all others at their first row."""
        return Cursor(
            cursor.sample, carried(cursor.drawn_D, self.kept_D), carried(cursor.owed_D, self.kept_D)
        )

    def weights_D(self, old_D: Sequence[float], initial_D: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give new sources their initial share; the others share the rest in the proportion they had."""
        new_D = np.array([old is None for old in self.named_D])
        kept_D = carried(old_D, self.named_D)
        rest = 1 - initial_D[new_D].sum()
        if not kept_D.any() or rest <= 0:  # nothing has a share to keep, or there is none left for it
            return initial_D.copy()
        # not divided by its sum, 1 to rounding: asked again from what it gave, it must give the same bits
        return np.where(new_D, initial_D, kept_D * (rest / kept_D.sum()))

    def describe(self, old_D: Sequence[float], weights_D: Sequence[float], cursor: Cursor) -> list[str]:
        """Say what becomes of each source, a line each, for the log and the ledger."""
        lines = []
        for d, (name, size) in enumerate(zip(self.after.names, self.after.sizes, strict=True)):
            old = self.named_D[d]
            if old is None:
                lines.append(f"{name}: new, {size} rows, weight {weights_D[d]:.6f}")
                continue
            what = f"changed, {self.before.sizes[old]} -> {size} rows, from the first row on"
            if self.kept_D[d] is not None:
                epoch, row = divmod(int(cursor.drawn_D[d]), size)
                what = f"as it was, goes on after {row} rows of epoch {epoch}"
            lines.append(f"{name}: {what}, weight {old_D[old]:.6f} -> {weights_D[d]:.6f}")
        return lines + [f"{name}: removed" for name in self.before.names if name not in self.after.names]

    def carry(self, state: RunState, initial_D: NDArray[np.float64]) -> tuple[RunState, list[str]]:
        """Return the state for the sources of `after`, and what was done, line by line.

        `initial_D` are shares that the sources would begin a run with. Losses and tokens of the log interval
        in hand go by name: those of removed sources leave with them.
        """
        mix, blend, log = state.mix, state.mix.blend, state.log_interval
        old_D = blend.stages[-1].weights
        cursor = self.cursor(blend.cursor_at(state.progress.consumed_samples))
        weights_D = self.weights_D(old_D, initial_D)
        tokens_D = torch.from_numpy(carried(state.progress.tokens_D, self.named_D))
        state = replace(
            state,
            progress=replace(state.progress, tokens_D=tokens_D),
            log_interval=replace(log, stats=SourceStats.of(carried(log.stats.sums, self.named_D))),
            mix=replace(
                mix,
                blend=blend.with_sources(self.after.sizes, cursor, weights_D),
                controller=mix.controller.with_sources(self.after.names, self.kept_D, weights_D),
                interval_counts=carried(mix.interval_counts, self.kept_D, axis=1),
                interval_stats=SourceStats.of(carried(mix.interval_stats.sums, self.kept_D)),
            ),
        )
        return state, self.describe(old_D, weights_D.tolist(), cursor)


def carried(values: ArrayLike, old_index_D: Sequence[int | None], *, axis: int = -1) -> NDArray[Any]:
    """Return the values of the old sources with these indices along an axis, 0 where there is none."""
    array = np.moveaxis(np.asarray(values), axis, 0)
    nothing = np.zeros_like(array[0])
    moved = np.stack([nothing if old is None else array[old] for old in old_index_D])
    return np.moveaxis(moved, 0, axis)
