"""The packed rows of one source as a Megatron dataset.

Shape legend: S positions of a row.
"""

from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_dynmix.data.packed import PackedSource


class PackedRows(MegatronDataset):
    """Rows of ``seq_length`` positions, each holding one or more whole examples of one source."""

    def __init__(self, packed: PackedSource, pad_id: int) -> None:
        indexed = IndexedDataset(str(packed.prefix), multimodal=True)
        config = BlendedMegatronDatasetConfig(
            random_seed=packed.seed,
            sequence_length=packed.seq_length,
            blend=([indexed.path_prefix], None),
            split="1",
        )
        rows = packed.packing_report.rows
        super().__init__(indexed, indexed.path_prefix, packed.documents_N, rows, Split.train, config)
        self.packed, self.name, self.packing_report = packed, packed.name, packed.packing_report
        self._pad_id = pad_id

    @property
    def mean_examples_per_row(self) -> float:
        """Examples per row, on average."""
        return self.packed.mean_examples_per_row

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.packing_report.rows

    def __getitem__(self, row: int) -> dict[str, NDArray[Any]]:
        """Return one row as arrays of S positions, padding filled with the pad id and loss mask 0.

        ``tokens``, ``labels`` (int64), ``loss_mask`` (float32, 1 where the label is trained on),
        ``position_ids`` (int64, from 0 in each segment), ``segment_ids`` (int64: 0, 1, ... and -1 in
        the row's padding; what pads an example belongs to its segment), ``padding_mask`` (bool, True =
        padding).
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in 0..{len(self) - 1}")
        size = self.config.sequence_length
        arrays = {
            "tokens": np.full(size, self._pad_id, dtype=np.int64),
            "labels": np.full(size, self._pad_id, dtype=np.int64),
            "loss_mask": np.zeros(size, dtype=np.float32),
            "position_ids": np.zeros(size, dtype=np.int64),
            "segment_ids": np.full(size, -1, dtype=np.int64),
            "padding_mask": np.ones(size, dtype=bool),
        }
        multiple = self.packed.segment_multiple
        begin = 0
        for segment, document in enumerate(self.examples_of(row)):
            ids, trained = read_example(self.dataset, document)
            length = min(len(ids) - 1, size)
            where = slice(begin, begin + length)
            arrays["tokens"][where] = ids[:length]
            arrays["labels"][where] = ids[1 : length + 1]
            arrays["loss_mask"][where] = trained[1 : length + 1]
            arrays["position_ids"][where] = np.arange(length)
            arrays["padding_mask"][where] = False
            padded = -(-length // multiple) * multiple
            arrays["segment_ids"][begin : begin + padded] = segment
            begin += padded
        return arrays

    def examples_of(self, row: int) -> list[int]:
        """Return which examples of the source a row holds, in order, by their numbers in the source."""
        first, last = self.packed.row_starts_R1[row : row + 2]
        documents: list[int] = self.packed.documents_N[first:last].tolist()
        return documents


def read_example(indexed: IndexedDataset, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return an example's token ids and modes (1 = trained on), one of each per token."""
    index = indexed.index
    first, last = index.document_indices[number : number + 2]
    lengths = index.sequence_lengths[first:last]
    ids = indexed.bin_reader.read(
        dtype=index.dtype, count=int(lengths.sum()), offset=int(index.sequence_pointers[first])
    )
    return ids, np.repeat(index.sequence_modes[first:last], lengths)
