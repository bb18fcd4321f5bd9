"""What the tests of the blend share: sources in memory, and a run of many stages."""

from collections.abc import Sequence

import numpy as np
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_dynmix.data.blend import Chunk, Cursor, build_chunk
from megatron_dynmix.data.blend_plan import BlendPlan


class Rows(MegatronDataset):
    """A source whose row r holds [dataset_id, r]."""

    def __init__(self, dataset_id: int, size: int) -> None:
        # the parent wants files; a blend needs a length, an item, a split and a description
        self.dataset_id, self.size, self.index_split = dataset_id, size, Split.train
        self.unique_identifiers = {"source": dataset_id, "rows": size}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> dict[str, NDArray[np.int64]]:
        assert 0 <= row < self.size
        return {"tokens": np.array([self.dataset_id, row])}


def sources(*sizes: int) -> list[Rows]:
    return [Rows(dataset_id, size) for dataset_id, size in enumerate(sizes)]


def blend_of(sizes: Sequence[int], weights: Sequence[float], chunk_size: int, seed: int = 7) -> BlendPlan:
    weights_D = np.array(weights, float) / np.sum(weights)
    names = [f"source {number}" for number in range(len(sizes))]
    return BlendPlan(sizes, weights_D, names=names, seed=seed, chunk_size=chunk_size)


def chunks_of(stages: Sequence[tuple[Sequence[float], int]]) -> list[Chunk]:
    """One chunk per (weights, length), each going on where the last one ended."""
    cursor, chunks = Cursor.start(len(stages[0][0])), []
    for weights, length in stages:
        chunk = build_chunk(cursor, np.asarray(weights, float), length)
        cursor = chunk.cursor_at(chunk.end_sample)
        chunks.append(chunk)
    return chunks
