"""A permutation of 0..size-1 that costs no memory: reshuffles the later epochs of a source.

A Feistel network over the next power of four, with cycle walking. It is integer arithmetic of our own,
so the order of a run does not depend on the release of a library.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 4
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014), on Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _round_keys(seed: int, dataset_id: int, epoch: int) -> list[np.uint64]:
    key = _mix(_mix(_mix(seed & _MASK) ^ dataset_id) ^ epoch)
    return [np.uint64(_mix(key + number)) for number in range(_ROUNDS)]


def permute(
    position_N: NDArray[np.int64], *, size: int, seed: int, dataset_id: int, epoch: int
) -> NDArray[np.int64]:
    """Where the shuffle of one epoch of one source puts each position.

    Args:
        position_N: positions inside the epoch, 0 <= position < size.
        size: rows of the source.
        seed: seed of the run.
        dataset_id: index of the source.
        epoch: which pass over the source; every epoch has its own permutation.

    Returns:
        Row of each position, int64; a bijection of 0..size-1.

    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = _round_keys(seed, dataset_id, epoch)
    value_N = position_N.astype(np.uint64)
    todo = np.arange(value_N.size)
    while todo.size:  # values outside the range walk on along their cycle until they fall inside
        value_N[todo] = _feistel(value_N[todo], keys, shift, mask)
        todo = todo[value_N[todo] >= size]
    return value_N.astype(np.int64)


def _feistel(
    value_N: NDArray[np.uint64], keys: list[np.uint64], shift: np.uint64, mask: np.uint64
) -> NDArray[np.uint64]:
    left, right = value_N >> shift, value_N & mask
    for key in keys:
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << shift) | right
