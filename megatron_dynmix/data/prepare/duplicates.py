"""Exact duplicates, from the digests that stand beside each prepared source.

A digest takes 16 bytes, so a million examples (about 1 GB of conversations) take 16 MB on disk, and some
40 MB while they are sorted. Shape legend: N examples of one source or of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.prepare.examples import DIGEST


@dataclass(frozen=True, kw_only=True)
class Shared:
    """How many different texts stand in both of two sources (indices into what was compared)."""

    first: int
    second: int
    texts: int


def read_digests(path: Path) -> NDArray[np.void]:
    """Return the digests of a prepared source's examples, in the order of its documents."""
    return np.fromfile(path, dtype=DIGEST)


def count_duplicates(digests_N: NDArray[np.void]) -> int:
    """Return how many examples have a text that an earlier example has."""
    order_N = _order(digests_N)
    return int(_equals_previous(digests_N[order_N]).sum())


def shared_texts(digests: Sequence[NDArray[np.void]]) -> list[Shared]:
    """Return the pairs of sources that have a text in common, and how many texts they share."""
    all_N = np.concatenate(digests)
    source_N = np.repeat(np.arange(len(digests)), [len(one) for one in digests])
    order_N = _order(all_N)
    group_N = np.cumsum(~_equals_previous(all_N[order_N]))
    # one entry for each (text, source), then the texts that have more than one
    groups_and_sources = np.unique(np.stack([group_N, source_N[order_N]], axis=1), axis=0)
    counts: dict[tuple[int, int], int] = {}
    borders = np.flatnonzero(np.diff(groups_and_sources[:, 0], prepend=-1, append=-1))
    several = np.flatnonzero(np.diff(borders) > 1)
    for first, last in zip(borders[several], borders[several + 1], strict=True):
        sources = groups_and_sources[first:last, 1].tolist()
        for at, one in enumerate(sources):
            for other in sources[at + 1 :]:
                counts[one, other] = counts.get((one, other), 0) + 1
    return [
        Shared(first=first, second=second, texts=texts) for (first, second), texts in sorted(counts.items())
    ]


def _order(digests_N: NDArray[np.void]) -> NDArray[np.intp]:
    return np.lexsort((digests_N["low"], digests_N["high"]))


def _equals_previous(sorted_N: NDArray[np.void]) -> NDArray[np.bool_]:
    if not len(sorted_N):
        return np.empty(0, dtype=bool)
    same_N = sorted_N[1:] == sorted_N[:-1]
    return np.concatenate([[False], same_N])
