"""The permutation behind the later epochs of a source."""

import numpy as np
import pytest

from megatron_dynmix.data.blend import permute

GOLDEN_10 = [8, 0, 6, 2, 1, 7, 3, 5, 4, 9]
GOLDEN_MILLION = [882316, 86024, 376271, 555813, 74248]


def permutation(size: int, seed: int = 1234, epoch: int = 1) -> list[int]:
    rows = permute(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert rows.dtype == np.int64
    return rows.tolist()


def test_it_is_a_bijection_for_every_small_size():
    for size in (*range(1, 300), *range(300, 2001, 17)):
        rows = permute(np.arange(size), size=size, seed=size % 5, epoch=1 + size % 3)
        assert np.bincount(rows, minlength=size).tolist() == [1] * size, f"size {size}"


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537])
def test_it_is_a_bijection_around_a_power_of_four(size):
    assert sorted(permutation(size)) == list(range(size))


def test_seed_and_epoch_each_change_it():
    orders = [
        permutation(200),
        permutation(200, seed=1235),
        permutation(200, epoch=2),
        permutation(200, seed=1235, epoch=2),
        list(range(200)),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_part_of_the_positions_gives_that_part_of_the_whole():
    whole = permutation(333)
    part_N = np.array([5, 332, 0, 71])
    part = permute(part_N, size=333, seed=1234, epoch=1)
    assert part.tolist() == [whole[position] for position in part_N]
    assert part_N.tolist() == [5, 332, 0, 71], "the caller's positions are left as they were"


def test_it_looks_random():
    """Mean displacement of a random permutation is a third of its size; neighbours part."""
    size = 3000
    rows = np.array(permutation(size))
    assert abs(np.abs(rows - np.arange(size)).mean() / size - 1 / 3) < 0.02
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.005


def test_an_empty_request_is_empty():
    assert permute(np.zeros(0, np.int64), size=5, seed=1, epoch=1).tolist() == []


def test_golden_values():
    """Frozen: another value here changes the order of every run that is resumed."""
    assert permutation(10) == GOLDEN_10
    rows = permute(np.arange(5), size=1_000_000, seed=42, epoch=2)
    assert rows.tolist() == GOLDEN_MILLION
