"""The blend as a pure function: global sample -> (dataset_id, row), from (seed, names, sizes, stages).

The weights of a run are a list of stages. A stage is materialized one chunk at a time; from chunk to
chunk and from stage to stage only two small vectors carry over: how many rows of each source were drawn,
and the fraction of a row that rounding still owes it. Later epochs of a source are reshuffled by a
permutation that takes no memory. Axes: D sources, N samples of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.files import sha256

_ROUNDS = 4
MAX_STRAY = 2.0
"""No prefix of a stage may be this many rows off its weights, for any source."""


@dataclass(frozen=True)
class Stage:
    """An immutable piece of the blend: from `start_sample` on, draw with `weights`."""

    start_sample: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Cursor:
    """Where the blend stands at one sample."""

    sample: int
    """Global samples drawn so far."""
    drawn_D: NDArray[np.int64]
    """Rows drawn of each source; epochs and rows follow from it."""
    owed_D: NDArray[np.float64]
    """Sum over stages of weight x length, less what was drawn: below one row for each source."""

    @classmethod
    def start(cls, num_sources: int) -> Cursor:
        """Return the cursor of a run that has drawn nothing."""
        return cls(0, np.zeros(num_sources, np.int64), np.zeros(num_sources))


@dataclass(frozen=True)
class Chunk:
    """The next samples of a stage: the source of each, and its ordinal among all rows of that source."""

    start: Cursor
    weights_D: NDArray[np.float64]
    dataset_index_N: NDArray[np.int16]
    ordinal_N: NDArray[np.int64]

    @property
    def end_sample(self) -> int:
        """First global sample after the chunk."""
        return self.start.sample + len(self.dataset_index_N)

    def cursor_at(self, sample: int) -> Cursor:
        """Return the cursor after the samples before `sample`; a chunk need not be used up."""
        used = sample - self.start.sample
        assert 0 <= used <= len(self.dataset_index_N), "sample lies outside the chunk"
        counts_D = np.bincount(self.dataset_index_N[:used], minlength=len(self.weights_D))
        owed_D = self.start.owed_D + self.weights_D * used - counts_D
        return Cursor(sample, self.start.drawn_D + counts_D, owed_D)


def build_chunk(start: Cursor, weights_D: NDArray[np.float64], length: int) -> Chunk:
    """Draw `length` samples so that every prefix follows the weights, and pay what rounding owes.

    Megatron-Core's greedy helper draws them: it always takes the source furthest behind. Restarting the
    greedy would forget the rounding at every chunk (a source due less than one row per chunk would never
    be drawn), so what is owed is added to what the helper is asked for. From a fresh cursor, with whole
    numbers of rows due, the result is that of a stock `BlendedDataset`.

    The helper may end a row or two off; the last rows are then exchanged until every source has its share
    to within one row. Once in a thousand chunks its own unevenness and the row it has to pay back add up
    to a prefix two rows off; such a chunk is drawn by deadline instead, which is slower and never is.

    `weights_D` sums to 1; a source of weight 0 is paused and never drawn.
    """
    drawn_from_D = weights_D > 0
    # What paused sources are owed waits for them: the others bear it in equal parts, not by their weights.
    owed_D = start.owed_D - start.owed_D[drawn_from_D].mean()
    dataset_index_N, count_N = _draw_greedily(weights_D, owed_D, length)
    if _worst_prefix(weights_D, dataset_index_N, count_N) >= MAX_STRAY:
        dataset_index_N = _draw_by_deadline(weights_D, owed_D, length)
        count_N = _running_count(dataset_index_N)
    return Chunk(start, weights_D, dataset_index_N, count_N + start.drawn_D[dataset_index_N])


def advance(start: Cursor, weights_D: NDArray[np.float64], chunk_size: int, sample: int) -> Cursor:
    """Return the cursor at `sample`, from one at the start of a chunk before it."""
    while start.sample < sample:
        chunk = build_chunk(start, weights_D, chunk_size)
        start = chunk.cursor_at(min(sample, chunk.end_sample))
    return start


def _draw_greedily(
    weights_D: NDArray[np.float64], owed_D: NDArray[np.float64], length: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Draw with Megatron-Core's helper, then correct its last rows.

    Return the source of each sample, and how many samples of the chunk before it have the same source.
    """
    # In shares, not rows: with nothing owed they are the weights bit for bit, as a stock blend has them.
    share_D = np.where(weights_D > 0, np.maximum(weights_D + owed_D / length, 0.0), 0.0)
    if not share_D.any():  # a chunk so short that every source is ahead already
        share_D = weights_D
    share_D = share_D / share_D.sum()
    # The helper may pick a source of weight 0 when all others are exactly on target: leave those out.
    active = np.flatnonzero(share_D > 0)
    dataset_index_N, count_N = np.zeros(length, np.int16), np.zeros(length, np.int64)
    from megatron.core.datasets import helpers  # here: it brings torch, which preparing does without

    helpers.build_blending_indices(dataset_index_N, count_N, share_D[active], len(active), length, False)
    dataset_index_N = active.astype(np.int16)[dataset_index_N]
    moved = _exchange_last_rows(dataset_index_N, largest_remainder(share_D * length))
    before_D = np.bincount(dataset_index_N[:moved], minlength=len(weights_D))
    count_N[moved:] = before_D[dataset_index_N[moved:]] + _running_count(dataset_index_N[moved:])
    return dataset_index_N, count_N


def _draw_by_deadline(
    weights_D: NDArray[np.float64], owed_D: NDArray[np.float64], length: int
) -> NDArray[np.int16]:
    """Draw, at each sample, from the source among those behind that would first be a whole row behind.

    This is Tijdeman's rule for the chairman assignment problem (Discrete Math. 32, 1980): what is drawn
    of a source stays within one row of what is due, at every sample.
    """
    active = np.flatnonzero(weights_D > 0)
    weights_A, owed_A, count_A = weights_D[active], owed_D[active], np.zeros(len(active))
    dataset_index_N = np.zeros(length, np.int16)
    for sample in range(length):
        behind_A = owed_A + weights_A * (sample + 1) > count_A + 1e-9
        deadline_A = np.where(behind_A, (count_A + 1 - owed_A) / weights_A, np.inf)
        chosen = int(np.argmin(deadline_A))
        dataset_index_N[sample] = active[chosen]
        count_A[chosen] += 1
    return dataset_index_N


def _worst_prefix(
    weights_D: NDArray[np.float64], dataset_index_N: NDArray[np.int16], count_N: NDArray[np.int64]
) -> float:
    """Return the most rows by which any source, in any prefix of the chunk, is off its weight.

    A source is furthest behind just before one of its rows (or at the end), furthest ahead just after.
    """
    weight_N = weights_D[dataset_index_N]
    behind_N = np.arange(len(count_N), dtype=np.float64)
    behind_N *= weight_N
    behind_N -= count_N
    most_behind = behind_N.max()
    behind_N += weight_N
    most_ahead = 1 - behind_N.min()
    drawn_D = np.bincount(dataset_index_N, minlength=len(weights_D))
    return float(max(most_behind, most_ahead, (weights_D * len(count_N) - drawn_D).max()))


def stray(chunk: Chunk, used: int) -> float:
    """Return the most rows by which any source is off its weight in a prefix of the first `used` samples."""
    ids_N = chunk.dataset_index_N[:used]
    return _worst_prefix(chunk.weights_D, ids_N, chunk.ordinal_N[:used] - chunk.start.drawn_D[ids_N])


def _running_count(dataset_index_N: NDArray[np.int16]) -> NDArray[np.int64]:
    """Count the samples before each one that have the same source."""
    order_N = np.argsort(dataset_index_N, kind="stable")
    sizes_D = np.bincount(dataset_index_N)
    count_N = np.empty(len(order_N), np.int64)
    count_N[order_N] = np.arange(len(order_N)) - np.repeat(np.cumsum(sizes_D) - sizes_D, sizes_D)
    return count_N


def largest_remainder(due_D: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return whole numbers with the same sum, each less than one away; ties go to the lowest index."""
    counts_D = np.floor(due_D).astype(np.int64)
    missing = round(float(due_D.sum())) - int(counts_D.sum())
    counts_D[np.argsort(counts_D - due_D, kind="stable")[:missing]] += 1
    return counts_D


def _exchange_last_rows(dataset_index_N: NDArray[np.int16], counts_D: NDArray[np.int64]) -> int:
    """Make the index hold exactly `counts_D`, in place; return the first sample that was changed."""
    surplus_D = np.bincount(dataset_index_N, minlength=len(counts_D)) - counts_D
    ahead = np.repeat(np.arange(len(counts_D)), np.maximum(surplus_D, 0))
    behind = np.repeat(np.arange(len(counts_D)), np.maximum(-surplus_D, 0))
    first = len(dataset_index_N)
    for giver, taker in zip(ahead, behind, strict=True):
        last = len(dataset_index_N) - 1 - int(np.argmax(dataset_index_N[::-1] == giver))
        dataset_index_N[last] = taker
        first = min(first, last)
    return first


def order_seed(seed: int, source: str) -> int:
    """Return the number that a source's rows, and their order in every epoch, are drawn from.

    It follows from the run's seed and the source's name, which no other source of the run has. So sources of
    equal content are not drawn in step, which would put the same rows into the same batches, and an order
    does not change with the other sources, nor with the place among them.
    """
    return int(sha256([seed, source])[:15], 16)


def rows_of(
    dataset_id_N: NDArray[np.int16],
    ordinal_N: NDArray[np.int64],
    sizes_D: NDArray[np.int64],
    order_seeds_D: Sequence[int],
) -> NDArray[np.int64]:
    """Return which row of its source each drawn sample is.

    The first epoch takes the rows in their order (packing has shuffled them); each later epoch has its own
    permutation, so every row is drawn once before any is drawn twice.
    """
    epoch_N, row_N = np.divmod(ordinal_N, sizes_D[dataset_id_N])
    later = np.flatnonzero(epoch_N)
    if not later.size:
        return row_N
    # Samples of the same source and epoch side by side, so that each group is permuted in one call.
    group_N = epoch_N[later] * len(sizes_D) + dataset_id_N[later]
    order = np.argsort(group_N, kind="stable")
    borders = np.flatnonzero(np.diff(group_N[order])) + 1
    for here in np.split(later[order], borders):
        dataset_id = int(dataset_id_N[here[0]])
        row_N[here] = permute(
            row_N[here],
            size=int(sizes_D[dataset_id]),
            seed=order_seeds_D[dataset_id],
            epoch=int(epoch_N[here[0]]),
        )
    return row_N


def permute(position_N: NDArray[np.int64], *, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the row at each position, 0 <= position < size, of the shuffle of one epoch.

    A Feistel network over the next power of four, with cycle walking: a bijection of 0..size-1. It is
    integer arithmetic of our own, so the order of a run does not depend on the release of a library.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    key = splitmix64(splitmix64(np.array([seed] * _ROUNDS, np.uint64)) ^ np.uint64(epoch))
    keys = splitmix64(key + np.array(range(_ROUNDS), np.uint64))
    value_N = position_N.astype(np.uint64)
    todo = np.arange(value_N.size)
    while todo.size:  # values outside the range walk on along their cycle until they fall inside
        value_N[todo] = _feistel(value_N[todo], keys, shift, mask)
        todo = todo[value_N[todo] >= size]
    return value_N.astype(np.int64)


def _feistel(
    value_N: NDArray[np.uint64], keys: NDArray[np.uint64], shift: np.uint64, mask: np.uint64
) -> NDArray[np.uint64]:
    left, right = value_N >> shift, value_N & mask
    for key in keys:
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << shift) | right


def splitmix64(value_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return splitmix64's finalizer (Steele, Lea and Flood, 2014) of each number."""
    value_N = value_N + np.uint64(0x9E3779B97F4A7C15)
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))
