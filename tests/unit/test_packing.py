import time
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmix.data.packing import Packing, one_per_row, pack

LENGTHS = st.lists(st.integers(1, 40), max_size=200)


@settings(max_examples=200)
@given(lengths=LENGTHS, slack=st.integers(0, 60), seed=st.integers(0, 2**31))
def test_each_example_once_and_capacity_kept(lengths: list[int], slack: int, seed: int) -> None:
    lengths_N = np.array(lengths, dtype=np.int64)
    capacity = max(lengths, default=1) + slack
    packing = pack(lengths_N, capacity, seed)
    assert sorted(packing.order_N) == list(range(len(lengths)))
    assert packing.row_starts_R1[0] == 0
    assert packing.row_starts_R1[-1] == len(lengths)
    fill = [lengths_N[packing.order_N[a:b]].sum() for a, b in pairwise(packing.row_starts_R1)]
    assert all(1 <= total <= capacity for total in fill)
    # best fit never opens a row while an example would go into an open one
    assert sum(total * 2 <= capacity for total in fill) <= 1


@settings(max_examples=50)
@given(lengths=LENGTHS, seed=st.integers(0, 2**31))
def test_deterministic(lengths: list[int], seed: int) -> None:
    first, second = (pack(np.array(lengths, dtype=np.int32), 64, seed) for _ in range(2))
    assert np.array_equal(first.order_N, second.order_N)
    assert np.array_equal(first.row_starts_R1, second.row_starts_R1)


def test_same_rows_as_best_fit_decreasing_one_by_one() -> None:
    lengths = np.random.default_rng(3).integers(1, 100, 500)
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, used in enumerate(rows) if used + length <= 128]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    packing = pack(lengths, 128, 0)
    fill = np.add.reduceat(lengths[packing.order_N], packing.row_starts_R1[:-1])
    assert sorted(fill) == sorted(rows)


def test_golden() -> None:
    packing = pack(np.array([6, 4, 3, 7, 5, 5]), 10, seed=0)
    rows = [packing.order_N[a:b] for a, b in pairwise(packing.row_starts_R1)]
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 1], [2, 3], [4, 5]]


def test_seed_matters_and_rows_are_not_sorted_by_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 2000)
    first, other = pack(lengths, 512, 1), pack(lengths, 512, 2)
    assert not np.array_equal(first.order_N, other.order_N)
    assert first.num_rows == other.num_rows
    sizes = np.diff(first.row_starts_R1)
    assert abs(np.corrcoef(np.arange(len(sizes)), sizes)[0, 1]) < 0.2


def test_equal_lengths_are_mixed() -> None:
    order = pack(np.full(1000, 4), 8, 5).order_N
    assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.2


def test_mates_depend_on_the_seed_where_lengths_repeat() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 20_000), 1, 2048).astype(np.int64)
    first, other = (mates(pack(lengths, 2048, seed)) for seed in (1, 2))
    assert len(first & other) < 0.3 * len(first)


def mates(packing: Packing) -> set[tuple[int, int]]:
    """All pairs of examples that share a row."""
    return {
        pair
        for a, b in pairwise(packing.row_starts_R1)
        for pair in combinations(sorted(packing.order_N[a:b].tolist()), 2)
    }


def test_one_per_row() -> None:
    first, other = one_per_row(100, 1), one_per_row(100, 2)
    assert sorted(first.order_N) == sorted(other.order_N) == list(range(100))
    assert not np.array_equal(first.order_N, other.order_N)
    assert np.array_equal(first.row_starts_R1, np.arange(101))
    assert np.array_equal(first.order_N, one_per_row(100, 1).order_N)


def test_no_examples() -> None:
    packing = pack(np.array([], dtype=np.int64), 8, 0)
    assert packing.num_rows == 0
    assert packing.row_starts_R1.tolist() == [0]


@pytest.mark.parametrize("lengths", [[0, 3], [9], [-1]])
def test_length_out_of_range(lengths: list[int]) -> None:
    with pytest.raises(AssertionError):
        pack(np.array(lengths), 8, 0)


def test_a_million_examples_are_packed_full_and_fast() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1, 1_000_000), 1, 4096).astype(np.int64)
    begin = time.perf_counter()
    packing = pack(lengths, 4096, 0)
    assert time.perf_counter() - begin < 10  # a third of a second on an idle core
    assert lengths.sum() / (packing.num_rows * 4096) > 0.97
