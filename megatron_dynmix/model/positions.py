"""Which positions of a row, or of rows joined to one sequence, a context-parallel rank holds.

Axes: R context-parallel ranks, C positions on each, T positions of joined rows on this one.
"""

from __future__ import annotations

import torch


def context_parallel_positions(length: int, ranks: int, device: torch.device) -> torch.Tensor:
    """Return `[R, C]`: which positions of a row each context-parallel rank holds.

    As `megatron.core.utils.get_batch_on_this_cp_rank` has it, and the rotary embedding expects: of 2 x R
    equal parts, rank r has part r and part 2 R - 1 - r, so that causal attention is as much work on each.
    """
    positions = torch.arange(length, device=device)
    if ranks == 1:
        return positions[None]
    parts = positions.view(2 * ranks, -1)
    return torch.cat([parts[:ranks], parts[ranks:].flip(0)], dim=1)


def joined_positions(cu_seqlens: torch.Tensor, length: int, ranks: int, rank: int) -> torch.Tensor | slice:
    """Return `[T]`: which positions of joined rows a context-parallel rank holds, segment after segment.

    Of 2 x R equal parts of each segment, rank r has part r and part 2 R - 1 - r, as Transformer Engine wants.
    """
    if ranks == 1:
        return slice(None)
    own = torch.arange(length // ranks, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    segment_T = torch.bucketize(own, starts[1:] // ranks, right=True)
    first_T, part_T = starts[segment_T], starts.diff()[segment_T] // (2 * ranks)
    offset_T = own - first_T // ranks
    # the second of the two parts begins 2 R - 1 - 2 r parts after the first
    skipped_T = torch.where(offset_T < part_T, rank, 2 * (ranks - 1) - rank) * part_T
    return first_T + offset_T + skipped_T
