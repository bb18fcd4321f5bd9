"""Which row each global sample of a run is, while the weights change. Axes: D sources, N samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.blend import Chunk, Cursor, Stage, advance, build_chunk, order_seed, rows_of
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.strategy import half_of

Draw = tuple[int, int, int]
"""dataset_id, row, and half: whether it is an even (0) or an odd one (1) of the rows drawn of its source."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlendState:
    """Everything that a resumed blend needs, O(D + stages)."""

    seed: int
    chunk_size: int
    sizes: tuple[int, ...]
    stages: tuple[Stage, ...]
    cursor: Cursor
    """At the start of the chunk in use."""

    def cursor_at(self, sample: int) -> Cursor:
        """Return the cursor after the samples before `sample`, in the last stage from the chunk in use on."""
        return advance(self.cursor, np.array(self.stages[-1].weights), self.chunk_size, sample)

    def with_sources(
        self, sizes: Sequence[int], cursor: Cursor, weights_D: NDArray[np.float64]
    ) -> BlendState:
        """Return the state in which a stage of other sources has just begun at the cursor."""
        return replace(
            self,
            sizes=tuple(sizes),
            stages=(*self.stages, Stage(cursor.sample, tuple(weights_D.tolist()))),
            cursor=cursor,
        )

    def to_json(self) -> dict[str, Any]:
        """Return it in JSON types; reading it gives the same bits back."""
        return {
            "seed": self.seed,
            "chunk_size": self.chunk_size,
            "sizes": self.sizes,
            "stages": [[stage.start_sample, stage.weights] for stage in self.stages],
            "chunk_start": self.cursor.sample,
            "drawn": self.cursor.drawn_D.tolist(),
            "owed": self.cursor.owed_D.tolist(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> BlendState:
        """Read what `to_json` gave."""
        return cls(
            seed=record["seed"],
            chunk_size=record["chunk_size"],
            sizes=tuple(record["sizes"]),
            stages=tuple(Stage(start, tuple(weights)) for start, weights in record["stages"]),
            cursor=Cursor(record["chunk_start"], np.array(record["drawn"]), np.array(record["owed"], float)),
        )


class BlendPlan:
    """The draws of a run: a growing list of stages instead of one fixed set of weights.

    A stage is drawn chunk by chunk, `chunk_size` samples each, whatever is asked for at a time: the order
    of the samples does not depend on the batch size. Only the chunks in use are held, so the cost of a
    weight update does not grow with the run. Of the sources it takes their names and sizes alone: ranks that
    load nothing plan too.
    """

    _chunks: deque[Chunk]
    """Consecutive chunks of the last stage, the one in use first."""

    def __init__(
        self,
        size_D: Sequence[int] | NDArray[np.int64],
        weights_D: NDArray[np.float64],
        *,
        names: Sequence[str],
        seed: int,
        chunk_size: int,
    ) -> None:
        """Start a run's blend at sample 0; every source has rows, and a weight of 0 pauses one.

        `chunk_size`, the samples materialized at a time (interval x global batch size), belongs to the order,
        not to the batch: it stays what it was when a run is resumed.
        """
        if len(size_D) > np.iinfo(np.int16).max - 1:
            raise InputError(f"{len(size_D)} sources given; dataset_id is int16: at most 32,766 are possible")
        self.seed = seed
        self.chunk_size = chunk_size
        self.sizes_D = np.array(size_D, np.int64)
        self._order_seeds_D = [order_seed(seed, name) for name in names]
        self.stages: list[Stage] = []
        self._begin_stage(Cursor.start(len(size_D)), weights_D)

    @property
    def chunk(self) -> Chunk:
        """The oldest chunk still held: the one in use."""
        return self._chunks[0]

    @property
    def weights_D(self) -> NDArray[np.float64]:
        """Weights in force."""
        return self._chunks[0].weights_D

    def append_stage(self, start_sample: int, weights_D: NDArray[np.float64]) -> None:
        """From `start_sample` on draw with `weights_D`; earlier samples stay as they were."""
        self._begin_stage(self.cursor_at(start_sample), weights_D)

    def draws(self, first: int, last: int) -> list[Draw]:
        """Return the draws of the global samples first <= i < last, from the chunk in use on."""
        self._reach(last)
        assert first >= self.chunk.start.sample, "these samples were let go"
        found: list[Draw] = []
        for chunk in self._chunks:
            here = slice(max(first - chunk.start.sample, 0), max(last - chunk.start.sample, 0))
            ids_N, ordinal_N = chunk.dataset_index_N[here], chunk.ordinal_N[here]
            rows_N = rows_of(ids_N, ordinal_N, self.sizes_D, self._order_seeds_D)
            found += zip(ids_N.tolist(), rows_N.tolist(), half_of(ordinal_N).tolist(), strict=True)
        return found

    def advance_to(self, sample: int) -> None:
        """Materialise the chunk that holds `sample`, in the current stage, and let go of those before it."""
        while sample >= self.chunk.end_sample:
            self._reach(self.chunk.end_sample + 1)
            self._chunks.popleft()

    def cursor_at(self, sample: int) -> Cursor:
        """Return the cursor after the samples before `sample`, from the chunk in use on."""
        self._reach(sample)  # this rank's own micro-batches may have ended a chunk earlier
        return next(chunk for chunk in self._chunks if sample <= chunk.end_sample).cursor_at(sample)

    def drawn_D(self, sample: int) -> NDArray[np.int64]:
        """Return the rows of each source among the samples before `sample`."""
        return self.cursor_at(sample).drawn_D

    @property
    def state(self) -> BlendState:
        """What a resumed run needs."""
        return BlendState(
            seed=self.seed,
            chunk_size=self.chunk_size,
            sizes=tuple(self.sizes_D.tolist()),
            stages=tuple(self.stages),
            cursor=self.chunk.start,
        )

    def resume(self, state: BlendState) -> None:
        """Continue from a state; sources of other sizes, whose order could not be kept, are an InputError."""
        sizes = self.sizes_D.tolist()
        if list(state.sizes) != sizes or state.seed != self.seed:
            raise InputError(
                f"the checkpoint was written with seed {state.seed} and sources of {list(state.sizes)} rows; "
                f"now they are seed {self.seed} and {sizes} rows. Resume with the same data, "
                "seq_length and seed, or start a new run directory"
            )
        self.chunk_size = state.chunk_size
        self.stages = list(state.stages)
        weights_D = np.array(self.stages[-1].weights)
        self._chunks = deque([build_chunk(state.cursor, weights_D, self.chunk_size)])

    def _begin_stage(self, cursor: Cursor, weights_D: NDArray[np.float64]) -> None:
        weights_D = np.asarray(weights_D, np.float64)
        self._chunks = deque([build_chunk(cursor, weights_D, self.chunk_size)])
        self.stages.append(Stage(cursor.sample, tuple(weights_D.tolist())))

    def _reach(self, end: int) -> None:
        """Materialise chunks, always whole ones, until all samples before `end` are there."""
        while (last := self._chunks[-1]).end_sample < end:
            after = last.cursor_at(last.end_sample)
            self._chunks.append(build_chunk(after, last.weights_D, self.chunk_size))
