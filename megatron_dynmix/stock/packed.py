"""Rows that `megatron-dynmix prepare` and packing made, as a dataset of stock's own kind.

Shape legend: B rows of a micro-batch, S positions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray

from megatron_dynmix.data.packed import PackedSource
from megatron_dynmix.data.rows import PackedRows


class StockRows(MegatronDataset):
    """The packed rows of one source, with the keys of stock's batches."""

    joined = False
    """Whether Transformer Engine takes them: by the lengths of its sequences, not by a mask."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> PackedRows:
        """Pack the source; the packing is kept in `--data-cache-path`."""
        cache, tokenizer = config.path_to_cache, config.tokenizer
        source = PackedSource(
            name=Path(dataset_path).name,
            prefix=Path(dataset_path),
            seq_length=config.sequence_length,
            seed=config.random_seed,
            overlong="drop",
            cache_dir=None if cache is None else Path(cache),
        )
        return PackedRows(source, tokenizer.eod)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: PackedRows) -> int:
        """Return the number of rows."""
        return len(low_level_dataset)

    def __len__(self) -> int:
        return len(self.indices) if self.num_samples is None else self.num_samples

    def row(self, i: int) -> int:
        """Return the number in its source of a row of this split."""
        return int(self.indices[i % len(self.indices)])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return one row; where conversations are is in its mask, or in the lengths of its sequences."""
        row = self.dataset[self.row(i)]
        segment_S = row["segment_ids"]
        del row["padding_mask"]
        if self.joined:
            row["cu_seqlens"], row["max_seqlen"] = starts_of(segment_S)
        else:
            row["attention_mask"] = mask_of(torch.from_numpy(segment_S)[None])[0]
        return row

    def segments(self, i: int) -> NDArray[np.int64]:
        """Return the number of the conversation at each position, -1 in padding; no token is read."""
        rows: PackedRows = self.dataset
        index = rows.dataset.index
        segment_S = np.full(rows.config.sequence_length, -1, np.int64)
        begin = 0
        for number, document in enumerate(rows.examples_of(self.row(i))):
            first, last = index.document_indices[document : document + 2]
            end = min(begin + int(index.sequence_lengths[first:last].sum()) - 1, len(segment_S))
            segment_S[begin:end] = number
            begin = end
        return segment_S

    @property
    def mean_examples_per_row(self) -> float:
        """Examples per row, on average."""
        return float(self.dataset.mean_examples_per_row)


class JoinedRows(StockRows):
    """Packed rows for Transformer Engine."""

    joined = True


def mask_of(segment_BS: torch.Tensor) -> torch.Tensor:
    """Return `[B, 1, S, S]`, True where a position may not look: ahead, or into another conversation."""
    positions = segment_BS.shape[1]
    causal_SS = torch.ones(positions, positions, dtype=torch.bool, device=segment_BS.device).tril()
    same_BSS = segment_BS[:, :, None] == segment_BS[:, None, :]
    return ~(causal_SS & same_BSS)[:, None]


def starts_of(segment_S: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the sequences of a row begin and end, padding as one of them, and the longest."""
    inside = np.flatnonzero(np.diff(segment_S)) + 1
    starts = torch.tensor([0, *inside.tolist(), len(segment_S)], dtype=torch.int32)
    return starts, starts.diff().max()


def joined_params(segments_BS: Sequence[NDArray[np.int64]], device: torch.device) -> PackedSeqParams:
    """Return what Transformer Engine is told of a micro-batch of one row."""
    (segment_S,) = segments_BS
    starts, longest = starts_of(segment_S)
    starts = starts.to(device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=int(longest),
        max_seqlen_kv=int(longest),
    )
