"""A micro-batch on its device, in the form the model takes: nothing here waits for the device.

Axes: B rows, S positions of a row, C of them on this context-parallel rank, T = B * C tokens of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dynmix.data.loader import MicroBatch
from megatron_dynmix.model.layers import segment_mask
from megatron_dynmix.model.positions import context_parallel_positions, joined_positions
from megatron_dynmix.moe.router import router_token_slice


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass needs, `[B, C]`; with `packed_seq_params`, all rows are one sequence (B = 1)."""

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    """1.0 where the label is trained on."""
    padding_mask: torch.Tensor
    """True = padding."""
    source: torch.Tensor
    """dataset_id of each position, -1 for padding; shaped like `tokens`."""
    half: torch.Tensor
    """0 or 1, whether the position's row is an even or an odd one of its source; shaped like `tokens`."""
    attention_mask: torch.Tensor | None
    packed_seq_params: PackedSeqParams | None

    def routed_T(self, sequence_parallel: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return source, half, and what is trained on, in the order in which this rank's routers see it."""
        source_T, half_T, trained_T = (
            router_token_slice(per_token.t(), sequence_parallel)
            for per_token in (self.source, self.half, self.loss_mask > 0)
        )
        return source_T, half_T, trained_T

    def token_losses(self, model: torch.nn.Module) -> torch.Tensor:
        """Run the model; return the loss of every position, or this pipeline stage's output."""
        return model(
            self.tokens,
            self.position_ids,
            self.attention_mask,
            labels=self.labels,
            packed_seq_params=self.packed_seq_params,
            padding_mask=self.padding_mask,
        )


def to_batch(micro_batch: MicroBatch, device: torch.device, *, join_rows: bool) -> Batch:
    """Move a micro-batch, the draw `[B]` and the arrays `[B, S]` of `PackedRows`, to the model's device.

    What follows from it is derived; for `join_rows` see `host.joins_rows`.
    """
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
    padding_BS = moved["padding_mask"].bool()
    source_BS = moved["dataset_id"].long()[:, None].expand_as(padding_BS).masked_fill(padding_BS, -1)
    half_BS = moved["half"].long()[:, None].expand_as(padding_BS)
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    attention_mask, packed = None, None
    if join_rows:
        packed = _packed_seq_params(moved["cu_seqlens"], padding_BS.shape[1])
        mine_T = joined_positions(moved["cu_seqlens"], padding_BS.numel(), ranks, rank)
    else:
        positions_RC = context_parallel_positions(padding_BS.shape[1], ranks, device)
        mine_C = positions_RC[rank]
        attention_mask = segment_mask(moved["segment_ids"], mine_C, positions_RC.flatten())

    def shaped(tensor_BS: torch.Tensor) -> torch.Tensor:
        return tensor_BS.reshape(1, -1)[:, mine_T] if join_rows else tensor_BS[:, mine_C]

    return Batch(
        tokens=shaped(moved["tokens"]),
        labels=shaped(moved["labels"]),
        position_ids=shaped(moved["position_ids"]),
        loss_mask=shaped(moved["loss_mask"]),
        padding_mask=shaped(padding_BS),
        source=shaped(source_BS),
        half=shaped(half_BS),
        attention_mask=attention_mask,
        packed_seq_params=packed,
    )


def _packed_seq_params(cu_seqlens: torch.Tensor, row_length: int) -> PackedSeqParams:
    """Return the segments of joined rows; none is longer than a row, and kernels are chosen by that bound."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=row_length,
        max_seqlen_kv=row_length,
    )
