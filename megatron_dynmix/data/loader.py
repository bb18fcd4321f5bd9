"""From the blend to the micro-batches of this rank.

Axes: B rows of a micro-batch, S positions, N segments that a micro-batch can have.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from megatron_dynmix.data.blend import Stage
from megatron_dynmix.data.blend_plan import BlendPlan, Draw

MicroBatch = dict[str, torch.Tensor]
PADDING = {"dataset_id": -1, "padding_mask": 1, "segment_ids": -1}
"""What the parts of a row hold that is all padding; 0 where nothing is said."""
_ASKING_TO_STOP = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def collate(rows: Sequence[Mapping[str, Any]], most_segments: int | None = None) -> MicroBatch:
    """Return rows as one micro-batch; `cu_seqlens` is in it if the segments a row can have are given."""
    micro_batch: MicroBatch = default_collate(list(rows))
    if most_segments is not None:
        micro_batch["cu_seqlens"] = segment_borders(micro_batch["segment_ids"], most_segments)
    return micro_batch


def segment_borders(segment_BS: torch.Tensor, most_segments: int) -> torch.Tensor:
    """Return `[N + 1]`, int32: the borders of all segments of all rows end to end.

    A row's padding is a segment of its own. The length is the same whatever the rows hold, so that no kernel
    is chosen anew for a micro-batch: segments that are missing are empty ones at the end.
    """
    starts_BS = torch.ones_like(segment_BS, dtype=torch.bool)
    starts_BS[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
    starts = starts_BS.flatten().nonzero().flatten()
    length = len(segment_BS) * most_segments + 1
    assert len(starts) < length, "a row has more segments than it can have"
    borders = torch.full((length,), segment_BS.numel(), dtype=torch.int32)
    borders[: len(starts)] = starts
    return borders


def pinned(micro_batch: MicroBatch) -> MicroBatch:
    """Put a micro-batch where a copy to the device waits for nothing, as the loader does with its own."""
    return {name: tensor.pin_memory() for name, tensor in micro_batch.items()}


@dataclass(frozen=True)
class DrawnRows(Dataset[dict[str, Any]]):
    """Rows of all sources, each asked for by its draw: workers hold no index that could be out of date."""

    sources: Sequence[Dataset[dict[str, Any]]]

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """Row `draw = (dataset_id, row, half)`, with the three numbers beside the row's own arrays."""
        dataset_id, row, half = draw
        return {
            "dataset_id": np.int16(dataset_id),
            "row": np.int64(row),
            "half": np.int8(half),
            **self.sources[dataset_id][row],
        }


@dataclass
class _BlendSampler:
    """Yields the explicit draws of this data-parallel rank's micro-batches.

    Micro-batch k of rank r holds the global samples from (k * dp_size + r) * micro_batch_size on, so the
    samples of a step are the same in every layout.
    """

    plan: BlendPlan
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    start_sample: int = 0
    until: int | None = None
    """Workers read ahead, but no sample from here on is asked for: its weights are not decided yet."""

    def __iter__(self) -> Iterator[list[Draw]]:
        first = self.start_sample + self.dp_rank * self.micro_batch_size
        stride = self.dp_size * self.micro_batch_size
        while self.until is None or first + self.micro_batch_size <= self.until:
            yield self.plan.draws(first, first + self.micro_batch_size)
            first += stride


class BlendLoader:
    """Micro-batches of one rank, step by step, read by worker processes.

    Every rank of a model replica reads the same rows from the memory-mapped sources: tensor- and
    pipeline-parallel ranks need no broadcast, and middle pipeline stages know masks and dataset_ids.
    """

    def __init__(
        self,
        plan: BlendPlan,
        sources: Sequence[Dataset[dict[str, Any]]],
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int,
        pin_memory: bool,
        most_segments: int | None = None,
    ) -> None:
        """Read rows; micro-batches have `cu_seqlens` if the segments a row can have are given."""
        self._plan, self.sources = plan, sources
        self._sampler = _BlendSampler(plan, micro_batch_size, dp_rank, dp_size)
        self._loader = DataLoader(
            DrawnRows(sources),
            batch_sampler=self._sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=partial(collate, most_segments=most_segments),
            pin_memory=pin_memory,
            worker_init_fn=_leave_the_end_to_the_rank,
            generator=torch.Generator(),  # the loader draws from it; the global one belongs to the model
        )
        self._iterator: Iterator[MicroBatch] | None = None
        self._stage: Stage | None = None
        self._next_sample = -1

    def step(
        self, consumed_samples: int, num_micro_batches: int, until: int | None = None
    ) -> list[MicroBatch]:
        """Return this rank's micro-batches of the step that begins at `consumed_samples`.

        Each holds `dataset_id`, `row` and `half` [B] and the arrays [B, S] of `PackedRows`. Steps may differ
        in size. `until` is the first sample whose weights are not decided yet, None if they never change.
        """
        self._plan.advance_to(consumed_samples)
        end = consumed_samples + num_micro_batches * self._sampler.micro_batch_size * self._sampler.dp_size
        assert until is None or end <= until, "a step may not go beyond the next weight update"
        stage, goes_on = self._plan.stages[-1], self._next_sample == consumed_samples
        if stage is not self._stage or not goes_on or until != self._sampler.until:
            self._sampler.start_sample, self._sampler.until = consumed_samples, until
            self._stage = stage
            # workers start with the first one; what was read ahead for other samples is dropped
            with _signals_held() if self._iterator is None else nullcontext():
                self._iterator = iter(self._loader)
        assert self._iterator is not None
        batches = [next(self._iterator) for _ in range(num_micro_batches)]
        self._next_sample = end
        return batches


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back signals that ask to stop; a process that is forked meanwhile keeps them held back."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING_TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_the_end_to_the_rank(worker: int) -> None:
    """Let the rank say how it ends, and read from this worker until then.

    A signal to the whole process group is the rank's to answer: one from a terminal or a scheduler leaves the
    worker as it is. The rank's own SIGTERM ends it, as torch's clean-up wants it. A rank that goes away while
    it is handed rows breaks their connection: of interest to nobody but the rank. Where a signal's sender
    cannot be known (macOS), a worker ends at any SIGTERM.
    """
    says = sys.excepthook

    def unless_the_rank_is_gone(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            says(kind, error, trace)

    sys.excepthook = unless_the_rank_is_gone
    if not hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING_TO_STOP)  # what is not forked begins without
    rank = multiprocessing.parent_process()
    assert rank is not None, "a worker is a child"

    def answer() -> None:
        while signal.sigwaitinfo({signal.SIGTERM, signal.SIGUSR1}).si_pid != rank.pid:
            pass
        os._exit(0)

    threading.Thread(target=answer, daemon=True).start()
