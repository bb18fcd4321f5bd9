"""Which examples share a row: best-fit decreasing on a histogram of lengths, or each example alone.

Shape legend: N examples, R rows, R1 = R + 1 row borders, G groups of equal rows.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packing:
    """Which examples share a row: row r holds ``order_N[row_starts_R1[r]:row_starts_R1[r + 1]]``."""

    order_N: NDArray[np.int64]
    row_starts_R1: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_starts_R1) - 1


class _Content(NamedTuple):
    """What a row holds: ``copies`` examples of one length, put upon what was there before."""

    length: int
    copies: int
    below: "_Content | None"


def pack(lengths_N: NDArray[np.integer], capacity: int, seed: int) -> Packing:
    """Pack examples into rows of at most ``capacity`` positions, each example exactly once.

    Best-fit decreasing (Johnson et al., SIAM J. Comput. 3, 1974) on (length, count) and on groups of
    rows with equal content, so the work grows with the number of different lengths. Which of the
    equally long examples goes where, and the order of the rows, are drawn from Philox(seed): the
    same arguments give the same packing on every machine.
    """
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    assert ((lengths_N >= 1) & (lengths_N <= capacity)).all(), "a length is not in 1..capacity"
    groups = _best_fit(np.bincount(lengths_N), capacity)
    slot_lengths_N, row_sizes_R = _expand(groups)

    rng = np.random.Generator(np.random.Philox(seed))
    shuffled_N = rng.permutation(len(lengths_N))
    by_length_N = shuffled_N[np.argsort(lengths_N[shuffled_N], kind="stable")]
    examples_N = np.empty_like(by_length_N)
    examples_N[np.argsort(slot_lengths_N, kind="stable")] = by_length_N

    rows_R = rng.permutation(len(row_sizes_R))
    old_starts_R = (np.cumsum(row_sizes_R) - row_sizes_R)[rows_R]
    row_starts_R1 = np.concatenate([[0], np.cumsum(row_sizes_R[rows_R])])
    within_N = np.arange(len(lengths_N)) - np.repeat(row_starts_R1[:-1], row_sizes_R[rows_R])
    order_N = examples_N[np.repeat(old_starts_R, row_sizes_R[rows_R]) + within_N]
    return Packing(order_N, row_starts_R1)


def one_per_row(num_examples: int, seed: int) -> Packing:
    """Give each example a row of its own, in an order drawn from Philox(seed)."""
    order_N = np.random.Generator(np.random.Philox(seed)).permutation(num_examples)
    return Packing(order_N, np.arange(num_examples + 1))


def _best_fit(counts: NDArray[np.int64], capacity: int) -> list[tuple[int, _Content]]:
    """Return groups ``(number of equal rows, content)`` for ``counts[length]`` examples."""
    groups_of_room: dict[int, list[tuple[int, _Content]]] = {}
    rooms: list[int] = []  # the keys of groups_of_room, sorted

    def put(room: int, rows: int, content: _Content) -> None:
        if room not in groups_of_room:
            groups_of_room[room] = []
            insort(rooms, room)
        groups_of_room[room].append((rows, content))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            content: _Content | None = None
            if at == len(rooms):
                room, rows = capacity, left
            else:
                room = rooms[at]
                rows, content = groups_of_room[room].pop()
                if not groups_of_room[room]:
                    del groups_of_room[room], rooms[at]
            # One more example of this length fits best where the last one went, until that row is full.
            copies = min(room // length, left)
            used = min(rows, left // copies)
            put(room - copies * length, used, _Content(length, copies, content))
            if content is not None and rows > used:
                put(room, rows - used, content)
            left -= used * copies
    return [group for groups in groups_of_room.values() for group in groups]


def _expand(groups: list[tuple[int, _Content]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the lengths of all slots, row after row, and the number of slots of each row."""
    slots = [np.empty(0, dtype=np.int64)]
    sizes = [np.empty(0, dtype=np.int64)]
    for rows, top in groups:
        row: list[int] = []
        content: _Content | None = top
        while content is not None:
            row.extend([content.length] * content.copies)
            content = content.below
        slots.append(np.tile(np.array(row, dtype=np.int64), rows))
        sizes.append(np.full(rows, len(row), dtype=np.int64))
    return np.concatenate(slots), np.concatenate(sizes)
