"""A blended dataset whose index is rebuilt whenever a stage is appended. Axes: D sources, N samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from numpy.typing import NDArray

from megatron_dynmix.data.blend import Chunk, Cursor, Stage, build_chunk, rows_of
from megatron_dynmix.errors import InputError


class DynamicBlendedDataset(BlendedDataset):
    """`BlendedDataset` with a growing list of stages instead of one fixed set of weights.

    Only the chunk in use is materialised, so the cost of a weight update does not grow with the run. An
    item is asked for by its explicit pair `(dataset_id, row)`: worker processes hold no index that could
    be out of date.
    """

    def __init__(
        self,
        datasets: Sequence[MegatronDataset],
        weights_D: NDArray[np.float64],
        *,
        seed: int,
        chunk_size: int,
    ) -> None:
        """Start a run's blend at sample 0.

        Args:
            datasets: one per source; every one has rows.
            weights_D: initial shares, summing to 1; 0 pauses a source.
            seed: seeds the reshuffling of later epochs.
            chunk_size: samples materialised at a time: interval x global batch size. It belongs to the
                blend, not to the layout: it stays what it was when a run is resumed.

        """
        # The parent's constructor refuses weight 0 and builds the index of the whole run; not called.
        if len(datasets) > np.iinfo(np.int16).max - 1:
            raise InputError(
                f"{len(datasets)} sources given; dataset_id is int16: at most 32,766 are possible"
            )
        self.datasets = list(datasets)
        self.split = self.datasets[0].index_split
        self.seed = seed
        self.chunk_size = chunk_size
        self.sizes_D = np.array([len(dataset) for dataset in datasets], np.int64)
        self.stages: list[Stage] = []
        self._start_chunk(Cursor.start(len(datasets)), weights_D)
        self._record_stage(0, weights_D)

    def __len__(self) -> int:
        return len(self.chunk.dataset_index_N)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        """Row `pair = (dataset_id, row)`, with its `dataset_id` beside the row's own arrays."""
        dataset_id, row = pair
        return {"dataset_id": np.int16(dataset_id), **self.datasets[dataset_id][row]}

    @property
    def weights_D(self) -> NDArray[np.float64]:
        """Weights in force."""
        return self.chunk.weights_D

    def append_stage(self, start_sample: int, weights_D: NDArray[np.float64]) -> None:
        """From `start_sample` on draw with `weights_D`; earlier samples stay as they were."""
        self._start_chunk(self.chunk.cursor_at(start_sample), weights_D)
        self._record_stage(start_sample, weights_D)

    def pairs(self, first: int, last: int) -> list[tuple[int, int]]:
        """(dataset_id, row) of the global samples first <= i < last, all in the current chunk."""
        here = slice(first - self.chunk.start.sample, last - self.chunk.start.sample)
        ids_N = self.chunk.dataset_index_N[here]
        rows_N = rows_of(ids_N, self.chunk.ordinal_N[here], self.sizes_D, self.seed)
        return list(zip(ids_N.tolist(), rows_N.tolist(), strict=True))

    def advance_to(self, sample: int) -> None:
        """Materialise the chunk that holds `sample`, going on in the current stage."""
        while sample >= self.chunk.end_sample:
            self._start_chunk(self.chunk.cursor_at(self.chunk.end_sample), self.weights_D)

    def drawn_D(self, sample: int) -> NDArray[np.int64]:
        """Rows of each source among the samples before `sample`."""
        return self.chunk.cursor_at(sample).drawn_D

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, O(D + stages): plain numbers, exact."""
        return {
            "seed": self.seed,
            "chunk_size": self.chunk_size,
            "sizes": self.sizes_D.tolist(),
            "stages": [[stage.start_sample, list(stage.weights)] for stage in self.stages],
            "chunk_start": self.chunk.start.sample,
            "drawn": self.chunk.start.drawn_D.tolist(),
            "owed": self.chunk.start.owed_D.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            InputError: if the sources have other sizes than they had, so the order could not be kept.

        """
        if state["sizes"] != self.sizes_D.tolist() or state["seed"] != self.seed:
            raise InputError(
                f"the checkpoint was written with seed {state['seed']} and sources of {state['sizes']} rows; "
                f"now they are seed {self.seed} and {self.sizes_D.tolist()} rows. Resume with the same data, "
                "seq_length and seed, or start a new run directory"
            )
        self.chunk_size = state["chunk_size"]
        self.stages = [Stage(start, tuple(weights)) for start, weights in state["stages"]]
        cursor = Cursor(state["chunk_start"], np.array(state["drawn"], np.int64), np.array(state["owed"]))
        self._start_chunk(cursor, np.array(self.stages[-1].weights))

    def _start_chunk(self, cursor: Cursor, weights_D: NDArray[np.float64]) -> None:
        self.chunk: Chunk = build_chunk(cursor, np.asarray(weights_D, np.float64), self.chunk_size)

    def _record_stage(self, start_sample: int, weights_D: NDArray[np.float64]) -> None:
        self.stages.append(Stage(start_sample, tuple(float(weight) for weight in weights_D)))
