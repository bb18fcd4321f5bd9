"""Slices of rows that context-parallel ranks hold. Axes: B rows, S positions, R ranks, C positions of one."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
from megatron.core import utils as megatron_utils

from megatron_dynmix import platform

platform.start()
from megatron_dynmix.model.layers import segment_mask  # noqa: E402
from megatron_dynmix.model.positions import context_parallel_positions, joined_positions  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_what_megatron_core_gives_them(ranks, monkeypatch):
    for owner, size, rank in (
        (megatron_utils, "get_pg_size", "get_pg_rank"),
        (torch.distributed, "get_world_size", "get_rank"),
    ):
        monkeypatch.setattr(owner, size, lambda group: group.size())
        monkeypatch.setattr(owner, rank, lambda group: group.rank())
    tokens_BS = torch.arange(48).view(2, 24)
    positions_RC = context_parallel_positions(24, ranks, CPU)
    assert positions_RC.flatten().sort().values.equal(torch.arange(24))
    take = megatron_utils.get_batch_on_this_cp_rank
    static = {"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(take).parameters else {}
    for rank, mine_C in enumerate(positions_RC):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        theirs = take({"tokens": tokens_BS}, cp_group=group, **static)
        assert tokens_BS[:, mine_C].equal(theirs["tokens"])


def test_one_rank_takes_a_row_of_any_length():
    assert context_parallel_positions(7, 1, CPU).tolist() == [[0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_hold_two_parts_of_each_segment(ranks):
    """As Transformer Engine documents it for packed sequences; a row may end in empty ones."""
    lengths = [2 * ranks * parts for parts in (1, 3, 1, 7)]
    borders = torch.tensor([0, *itertools.accumulate(lengths), *[sum(lengths)] * 3], dtype=torch.int32)
    seen = []
    for rank in range(ranks):
        mine = torch.arange(sum(lengths))[joined_positions(borders, sum(lengths), ranks, rank)].tolist()
        expected = []
        for start, length in zip(borders.tolist(), lengths, strict=False):
            parts = torch.arange(start, start + length).chunk(2 * ranks)
            expected += [*parts[rank].tolist(), *parts[2 * ranks - 1 - rank].tolist()]
        assert mine == (expected if ranks > 1 else sorted(expected))
        seen += mine
    assert sorted(seen) == list(range(sum(lengths)))


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_masks_as_the_whole_row_does(ranks):
    """Its queries are rows of the whole mask; the columns stand in the order of the gathered keys."""
    segment_BS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1], [0, 1, 1, 1, 1, 1, -1, -1]])
    everywhere = torch.arange(8)
    whole = segment_mask(segment_BS, everywhere, everywhere)
    assert whole.shape == (2, 1, 8, 8) and not whole.all(dim=-1).any()
    assert whole[0, 0, 4].tolist() == [True, True, True, False, False, True, True, True]
    positions_RC = context_parallel_positions(8, ranks, CPU)
    for mine_C in positions_RC:
        mask = segment_mask(segment_BS, mine_C, positions_RC.flatten())
        assert mask.equal(whole[:, :, mine_C][..., positions_RC.flatten()])
