"""The probe: held-out rows of every source, read in evaluation mode, always the same ones.

Axes: D sources, L MoE layers, E experts, B rows of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import default_collate

from megatron_dynmix.data.loader import MicroBatch
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.moe.reduction import reduce_counts
from megatron_dynmix.training.step import PassRunner, SourceStats


class Probe:
    """Measures gate loads and losses of all sources on their held-out rows."""

    def __init__(
        self,
        rows: Sequence[PackedRows],
        *,
        probe_tokens: int,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        """Read this rank's share of the rows once.

        Args:
            rows: held-out rows of each source.
            probe_tokens: positions to read of each source; a source with fewer is read whole.
            seq_length: positions of a row.
            micro_batch_size: rows of a micro-batch.
            dp_rank: this data-parallel rank.
            dp_size: data-parallel ranks; they share the rows.

        """
        per_source = -(-probe_tokens // seq_length)
        pairs = [(d, row) for d, held_out in enumerate(rows) for row in range(min(per_source, len(held_out)))]
        stride = micro_batch_size * dp_size
        # Expert parallelism needs the same number of passes on every rank: fill up with rows of padding.
        pairs += [(-1, 0)] * (-len(pairs) % stride)
        empty = _padding_row(rows[0][0])
        mine = (
            pairs[first : first + micro_batch_size]
            for first in range(dp_rank * micro_batch_size, len(pairs), stride)
        )
        self._micro_batches: list[MicroBatch] = [
            default_collate(
                [{"dataset_id": np.int16(d), **(rows[d][row] if d >= 0 else empty)} for d, row in share]
            )
            for share in mine
        ]

    def measure(self, run: PassRunner, seconds: dict[str, float]) -> tuple[torch.Tensor, SourceStats]:
        """Counts `[L, D, E]` and sums per source, of all ranks; training state is left as it was.

        `seconds["reduce"]` is set to the time of the reduction alone.
        """
        for chunk in run.chunks:
            chunk.eval()
        try:
            # Megatron-Core's schedules leave autograd on, and expert bias takes that for training.
            with torch.no_grad(), run.counter.recording():
                stats = run(self._micro_batches, forward_only=True)
        finally:
            for chunk in run.chunks:
                chunk.train()
        run.platform.synchronize()
        start = time.perf_counter()
        counts_LDE = reduce_counts(run.counter.take()).cpu()
        seconds["reduce"] = time.perf_counter() - start
        return counts_LDE, stats


def _padding_row(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Make a row of the same shape that is all padding."""
    empty = {name: np.zeros_like(values) for name, values in row.items()}
    empty["padding_mask"] = np.ones_like(row["padding_mask"])
    empty["segment_ids"] = np.full_like(row["segment_ids"], -1)
    return empty
