"""From the blend to the micro-batches of this rank. Axes: B rows of a micro-batch, S positions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from megatron_dynmix.data.blend import Chunk
from megatron_dynmix.data.dynamic_blend import DynamicBlendedDataset
from megatron_dynmix.errors import InputError

MicroBatch = dict[str, torch.Tensor]


class ChunkSampler(Sampler[list[tuple[int, int]]]):
    """Yields the explicit (dataset_id, row) pairs of this data-parallel rank's micro-batches.

    Micro-batch k of rank r holds the global samples from (k * dp_size + r) * micro_batch_size on, so the
    samples of a step are the same in every layout. The sampler ends with the blend's chunk: no worker can
    be asked for a sample whose weights are not decided yet.
    """

    def __init__(
        self, blend: DynamicBlendedDataset, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        self.blend = blend
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.start_sample = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start_sample + self.dp_rank * self.micro_batch_size
        stride = self.dp_size * self.micro_batch_size
        while first + self.micro_batch_size <= self.blend.chunk.end_sample:
            yield self.blend.pairs(first, first + self.micro_batch_size)
            first += stride


class BlendLoader:
    """Micro-batches of one rank, step by step, read by worker processes.

    Every rank of a model replica reads the same rows from the memory-mapped sources: tensor- and
    pipeline-parallel ranks need no broadcast, and middle pipeline stages know masks and dataset_ids.
    """

    def __init__(
        self,
        blend: DynamicBlendedDataset,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.blend = blend
        self._sampler = ChunkSampler(blend, micro_batch_size, dp_rank, dp_size)
        self._loader = DataLoader(
            blend,
            batch_sampler=self._sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # the loader draws from it; the global one belongs to the model
        )
        self._iterator: Iterator[MicroBatch] | None = None
        self._chunk: Chunk | None = None
        self._next_sample = -1

    def step(self, consumed_samples: int, num_micro_batches: int) -> list[MicroBatch]:
        """The micro-batches of the step that begins at `consumed_samples`.

        Returns:
            `num_micro_batches` dicts of `dataset_id` [B] and the row arrays [B, S] of `PackedRows`.

        Raises:
            InputError: a step that would cross the end of a chunk: the batch size of a resumed run changed.

        """
        self.blend.advance_to(consumed_samples)
        batch_size = num_micro_batches * self._sampler.micro_batch_size * self._sampler.dp_size
        if (left := self.blend.chunk.end_sample - consumed_samples) % batch_size:
            raise InputError(
                f"global_batch_size is {batch_size}, which does not divide the {left} samples left of "
                f"the blend's chunk of {self.blend.chunk_size}; resume with the batch size of the checkpoint"
            )
        if self._chunk is not self.blend.chunk or self._next_sample != consumed_samples:
            self._sampler.start_sample = consumed_samples
            self._chunk = self.blend.chunk
            self._iterator = iter(self._loader)
        assert self._iterator is not None
        batches = [next(self._iterator) for _ in range(num_micro_batches)]
        self._next_sample = consumed_samples + batch_size
        return batches
