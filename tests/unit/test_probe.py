"""Which held-out rows a probe reads. Axes: B rows of a micro-batch."""

from collections import Counter

import numpy as np
import pytest
import torch

from megatron_dynmix import platform

platform.start()
from megatron_dynmix.training.probe import Probe  # noqa: E402

SEQ_LENGTH = 4


class HeldOut:
    """A source of `size` rows; the tokens of row r are all r."""

    def __init__(self, size):
        self.size, self.read = size, Counter()

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        assert 0 <= row < self.size
        self.read[row] += 1
        return {
            "tokens": np.full(SEQ_LENGTH, row),
            "padding_mask": np.zeros(SEQ_LENGTH, bool),
            "segment_ids": np.zeros(SEQ_LENGTH, int),
        }


def probe_of(*sizes, rows=3, rotating=True, rank=0, ranks=1, micro=2, **form):
    return Probe(
        [HeldOut(size) for size in sizes],
        None,
        probe_tokens=rows * SEQ_LENGTH,
        seq_length=SEQ_LENGTH,
        micro_batch_size=micro,
        dp_rank=rank,
        dp_size=ranks,
        rotating=rotating,
        **form,
    )


def test_rows_that_rotate_cover_a_source_once_per_cycle():
    probe = probe_of(12, 7, 3, 2)
    assert [probe.rows_of(0, number) for number in (0, 3, 4)] == [[0, 1, 2], [9, 10, 11], [0, 1, 2]]
    assert sorted(row for number in range(4) for row in probe.rows_of(0, number)) == list(range(12))
    assert probe.rows_of(1, 2) == [6, 0, 1]
    seven = Counter(row for number in range(7) for row in probe.rows_of(1, number))
    assert seven == dict.fromkeys(range(7), 3)


def test_a_source_with_fewer_rows_than_the_budget_is_read_whole():
    probe = probe_of(3, 2)
    for number in range(5):
        assert sorted(probe.rows_of(0, number)) == [0, 1, 2]
        assert sorted(probe.rows_of(1, number)) == [0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_I3_the_ranks_share_the_rows_of_a_measurement(ranks, number):
    whole = [(d, row) for d in range(2) for row in probe_of(7, 5).rows_of(d, number)]
    shares = [probe_of(7, 5, rank=rank, ranks=ranks)._read(number) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    seen = []
    for batch in (batch for share in shares for batch in share):
        assert batch["dataset_id"].shape == (2,) and batch["tokens"].shape == (2, SEQ_LENGTH)
        for d, half, tokens, padding in zip(
            batch["dataset_id"], batch["half"], batch["tokens"], batch["padding_mask"], strict=True
        ):
            assert (d < 0) == padding.all()
            if d >= 0:
                assert half == tokens[0] % 2
                seen.append((int(d), int(tokens[0])))
    assert sorted(seen) == sorted(whole)


def test_fixed_rows_are_read_once_and_rows_that_rotate_are_not_kept():
    fixed, rotating = probe_of(12, rotating=False), probe_of(12)
    assert fixed._rows[0].read == {0: 2, 1: 1, 2: 1}  # row 0 gives the shape of padding too
    assert fixed._kept is not None and rotating._kept is None
    assert not rotating._rows[0].read


def test_micro_batches_of_a_probe_have_the_form_of_training(monkeypatch):
    put = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: put.append(tensor) or tensor)
    for batch in probe_of(3, 2, rotating=False, pin_memory=True, most_segments=2)._read(0):
        assert batch["cu_seqlens"].tolist() == [0, SEQ_LENGTH, *[2 * SEQ_LENGTH] * 3]
        assert all(any(tensor is pinned for pinned in put) for tensor in batch.values())
    put.clear()
    assert "cu_seqlens" not in probe_of(3)._read(0)[0] and not put
