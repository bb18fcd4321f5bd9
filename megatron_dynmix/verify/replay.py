"""Drawing a run again from the stages of its ledger, without its data.

Memory: one chunk, and three numbers per row of each source. Axes: D sources, N samples of a chunk, R rows of
a source, P samples of one source in one epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.blend import Chunk, Cursor, build_chunk, order_seed, rows_of, stray
from megatron_dynmix.records.ledger import sample_hash
from megatron_dynmix.records.schema import StageLine


class SourceTally:
    """Which rows of a source were drawn, and how often."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.drawn = 0
        self.lost = 0
        """Rows left out of an epoch that was drawn to its end, summed over epochs."""
        self.repeated = 0
        """Rows drawn again within an epoch."""
        self.times_R = np.zeros(size, np.int32)
        self._last_epoch_R = np.full(size, -1, np.int32)
        self._place_R = np.zeros(size, np.int32)
        self._distinct = 0

    def add(self, row_N: NDArray[np.int64]) -> None:
        """Count rows in the order in which they were drawn."""
        while row_N.size:
            epoch, done = divmod(self.drawn, self.size)
            piece_P, row_N = row_N[: self.size - done], row_N[self.size - done :]
            self._add_to_epoch(epoch, piece_P)
            self.drawn += len(piece_P)
            if self.drawn % self.size == 0:
                self.lost += self.size - self._distinct
                self._distinct = 0

    def _add_to_epoch(self, epoch: int, row_P: NDArray[np.int64]) -> None:
        # The last of equal rows wins the place: one of each is left, without sorting.
        place_P = np.arange(len(row_P), dtype=np.int32)
        self._place_R[row_P] = place_P
        one_of_each_P = self._place_R[row_P] == place_P
        if one_of_each_P.all():
            self.times_R[row_P] += 1
        else:
            np.add.at(self.times_R, row_P, 1)
        fresh = int((one_of_each_P & (self._last_epoch_R[row_P] != epoch)).sum())
        self._last_epoch_R[row_P] = epoch
        self._distinct += fresh
        self.repeated += len(row_P) - fresh


class Replay:
    """Stands at one sample of a run, and knows all that was drawn before."""

    def __init__(self, stage: StageLine) -> None:
        self.sample = 0
        self.retired: list[SourceTally] = []
        """Tallies of sources that left, or whose content changed."""
        self.tallies = _tallies(stage)
        self.worst_stray = 0.0
        """Most rows that any prefix of a chunk was off its weights."""
        self.digest = 0
        """Digest of the samples since it was last set to 0; see `DrawnSamples`."""
        self._cursor = Cursor.start(len(stage.weights))
        self._chunk: Chunk | None = None
        self.stage = stage

    @property
    def cursor(self) -> Cursor:
        """What was drawn of each source, and what is owed."""
        return self._cursor if self._chunk is None else self._chunk.cursor_at(self.sample)

    def go_to(self, sample: int) -> None:
        """Draw all samples before `sample`."""
        assert sample >= self.sample, "a replay goes forwards only"
        while self.sample < sample:
            if self._chunk is None or self.sample == self._chunk.end_sample:
                self._next_chunk()
            assert self._chunk is not None
            end = min(sample, self._chunk.end_sample)
            start = self._chunk.start.sample
            added = int(self._sum_N1[end - start]) - int(self._sum_N1[self.sample - start])
            self.digest = (self.digest + added) % 2**64
            self.sample = end

    def begin_stage(self, stage: StageLine) -> None:
        """From here on draw by another stage of the same sources."""
        self.settle()
        self.stage = stage

    def change_sources(self, stage: StageLine, cursor: Cursor, same_D: Sequence[int | None]) -> None:
        """From here on draw from other sources, which stand at `cursor`.

        `same_D` tells which of the sources so far each one is, if its content is the same.
        """
        self.begin_stage(stage)
        self._cursor = cursor
        old, new = self.tallies, _tallies(stage)
        self.retired += [tally for index, tally in enumerate(old) if index not in same_D]
        pairs = zip(same_D, new, strict=True)
        self.tallies = [fresh if same is None else old[same] for same, fresh in pairs]

    def settle(self) -> None:
        """Count the rows of the chunk in hand up to here, and leave it."""
        if self._chunk is None:
            return
        used = self.sample - self._chunk.start.sample
        ids_N, row_N = self._chunk.dataset_index_N[:used], self._row_N[:used]
        order = np.argsort(ids_N, kind="stable")
        counts_D = np.bincount(ids_N, minlength=len(self.tallies))
        groups = np.split(row_N[order], np.cumsum(counts_D)[:-1])
        for tally, rows_N in zip(self.tallies, groups, strict=True):
            tally.add(rows_N)
        if used:
            self.worst_stray = max(self.worst_stray, stray(self._chunk, used))
        self._cursor, self._chunk = self.cursor, None

    def _next_chunk(self) -> None:
        self.settle()
        stage = self.stage
        chunk = build_chunk(self._cursor, np.array(stage.weights), stage.chunk_size)
        ids_N = chunk.dataset_index_N
        order_seeds_D = [order_seed(stage.seed, name) for name in stage.sources]
        self._row_N = rows_of(ids_N, chunk.ordinal_N, np.array(stage.sizes), order_seeds_D)
        hash_N = sample_hash(np.arange(chunk.start.sample, chunk.end_sample), ids_N, self._row_N)
        self._sum_N1 = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hash_N, dtype=np.uint64)])
        self._chunk = chunk


def _tallies(stage: StageLine) -> list[SourceTally]:
    return [SourceTally(name, size) for name, size in zip(stage.sources, stage.sizes, strict=True)]
