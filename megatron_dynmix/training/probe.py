"""The probe: held-out rows of every source, read in evaluation mode.

Axes: H halves, D sources, L MoE layers, E experts, B rows of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from megatron_dynmix.data.loader import PADDING, MicroBatch, collate, pinned
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.mixing.strategy import half_of
from megatron_dynmix.moe.counter import reduce_counts
from megatron_dynmix.training.step import PassRunner


class Probe:
    """Measures gate loads and losses of all sources on their held-out rows; only losses of a dense model."""

    def __init__(
        self,
        rows: Sequence[PackedRows],
        run: PassRunner,
        *,
        probe_tokens: int,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        rotating: bool = False,
        pin_memory: bool = False,
        most_segments: int | None = None,
    ) -> None:
        """Read this rank's share of the held-out rows, if they stay the same, for passes of `run`.

        Of each source so many positions are read, or all of fewer: its first rows, or, `rotating`, from where
        the last measurement stopped. Data-parallel ranks share the rows. Micro-batches are as `BlendLoader`
        gives them.
        """
        self.run = run
        self._rows = rows
        self._per_source = -(-probe_tokens // seq_length)
        self._micro_batch_size = micro_batch_size
        self._first = dp_rank * micro_batch_size
        self._stride = dp_size * micro_batch_size
        self._pin_memory, self._most_segments = pin_memory, most_segments
        self._kept = None if rotating else self._read(0)

    def rows_of(self, source: int, measurement: int) -> list[int]:
        """Return the held-out rows of a source that measurement number `measurement` of a run reads."""
        size = len(self._rows[source])
        count = min(self._per_source, size)
        return [row % size for row in range(measurement * count, (measurement + 1) * count)]

    def measure(self, seconds: dict[str, float], measurement: int) -> tuple[torch.Tensor, SourceStats]:
        """Return counts `[H, D, L, E]` and sums per source of all ranks; leave training state as it was.

        The halves are even and odd rows of a source's file. The number of the measurement in the run decides
        the rows if they rotate; `seconds["reduce"]` is set to the time of the reduction alone.
        """
        run = self.run
        micro_batches = self._read(measurement) if self._kept is None else self._kept
        for chunk in run.chunks:
            chunk.eval()
        try:
            # Megatron-Core's schedules leave autograd on, and expert bias takes that for training.
            with torch.no_grad(), run.counter.recording():
                stats = run(micro_batches, forward_only=True)
        finally:
            for chunk in run.chunks:
                chunk.train()
        run.platform.synchronize()
        start = time.perf_counter()
        counts_HDLE = reduce_counts(run.counter.take()).cpu()
        seconds["reduce"] = time.perf_counter() - start
        return counts_HDLE, stats

    def _read(self, measurement: int) -> list[MicroBatch]:
        """Read the micro-batches of a measurement that are this rank's."""
        pairs = [(d, row) for d in range(len(self._rows)) for row in self.rows_of(d, measurement)]
        # Expert parallelism needs the same number of passes on every rank: fill up with rows of padding.
        pairs += [(-1, 0)] * (-len(pairs) % self._stride)
        empty = {name: np.full_like(row, PADDING.get(name, 0)) for name, row in self._rows[0][0].items()}
        micro_batches = [
            collate(
                [
                    {
                        "dataset_id": np.int16(d),
                        "half": np.int8(half_of(row)),
                        **(self._rows[d][row] if d >= 0 else empty),
                    }
                    for d, row in pairs[first : first + self._micro_batch_size]
                ],
                self._most_segments,
            )
            for first in range(self._first, len(pairs), self._stride)
        ]
        return [pinned(batch) for batch in micro_batches] if self._pin_memory else micro_batches
