"""A run of encoded examples as flat arrays: what workers hand over, and what goes to disk.

Shape legend: N examples, Q sequences of all of them (runs of equally trained tokens), T tokens of all.

Holding out examples for the probe: those with the smallest digests, so a source's own text decides.

A digest is as good as a random number and does not change when rows are appended or reordered: of n
examples, k new ones put back into training about k / (n + k) of those that were held out.

Exact duplicates, from the digests that stand beside each prepared source.

A digest takes 16 bytes, so a million examples (about 1 GB of conversations) take 16 MB on disk, and some
40 MB while they are sorted. Shape legend: N examples of one source or of all.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16
DIGEST = np.dtype([("high", ">u8"), ("low", ">u8")])
"""128 bits of BLAKE2b of an example's text, as two numbers; the order of (high, low) is that of the bytes."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples one after another; ``sequences_N`` says how many of the sequences belong to each."""

    tokens_T: NDArray[np.integer]
    lengths_Q: NDArray[np.int32]
    modes_Q: NDArray[np.int8]
    sequences_N: NDArray[np.int32]
    digests_N: NDArray[np.void]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.sequences_N)

    @property
    def sizes_N(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        if not len(self):
            return np.empty(0, dtype=np.int64)
        starts_N = np.cumsum(self.sequences_N) - self.sequences_N
        return np.add.reduceat(self.lengths_Q, starts_N, dtype=np.int64)

    def select(self, kept_N: NDArray[np.bool_]) -> "Examples":
        """Return the examples that ``kept_N`` is true for, in their order."""
        kept_Q = np.repeat(kept_N, self.sequences_N)
        return Examples(
            tokens_T=self.tokens_T[np.repeat(kept_Q, self.lengths_Q)],
            lengths_Q=self.lengths_Q[kept_Q],
            modes_Q=self.modes_Q[kept_Q],
            sequences_N=self.sequences_N[kept_N],
            digests_N=self.digests_N[kept_N],
        )


def join(parts: Sequence[Examples]) -> Examples:
    """Return the examples of all parts, one part after the other; there must be one part or more."""
    if len(parts) == 1:
        return parts[0]
    return Examples(
        tokens_T=np.concatenate([part.tokens_T for part in parts]),
        lengths_Q=np.concatenate([part.lengths_Q for part in parts]),
        modes_Q=np.concatenate([part.modes_Q for part in parts]),
        sequences_N=np.concatenate([part.sequences_N for part in parts]),
        # as bytes: joined as what they are, they would come out in this machine's byte order
        digests_N=np.concatenate([part.digests_N.view(np.uint8) for part in parts]).view(DIGEST),
    )


def pack_examples(
    ids: Sequence[NDArray[np.integer]],
    trained: Sequence[NDArray[np.bool_]],
    digests: Sequence[bytes],
    dtype: type[np.integer],
) -> Examples:
    """Lay examples end to end: token ids, whether each is trained on, and the digest of each text."""
    sizes_N = np.array([len(ids_T) for ids_T in ids], dtype=np.int64)
    tokens_T = np.concatenate(ids, dtype=dtype, casting="unsafe") if ids else np.empty(0, dtype=dtype)
    trained_T = np.concatenate(trained) if trained else np.empty(0, dtype=bool)
    starts_N = np.cumsum(sizes_N) - sizes_N
    # a sequence starts where an example does, and where being trained on changes
    is_start_T = np.concatenate([[True], trained_T[1:] != trained_T[:-1]])[: len(trained_T)]
    is_start_T[starts_N] = True
    starts_Q = np.flatnonzero(is_start_T)
    borders_N1 = np.append(np.searchsorted(starts_Q, starts_N), len(starts_Q))
    return Examples(
        tokens_T=tokens_T,
        lengths_Q=np.diff(starts_Q, append=len(tokens_T)).astype(np.int32),
        modes_Q=trained_T[starts_Q].astype(np.int8),
        sequences_N=np.diff(borders_N1).astype(np.int32),
        digests_N=np.frombuffer(b"".join(digests), dtype=DIGEST),
    )


class HeldOut:
    """Keeps the ``count`` distinct texts with the smallest digests; copies of a text stay together."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: dict[bytes, list[Examples]] = {}
        self._largest: list[_Reversed] = []

    def __len__(self) -> int:
        """Return the number of distinct texts that are held out."""
        return len(self._kept)

    def sift(self, examples: Examples) -> Examples:
        """Take what is to be held out so far, and return the others with what is given up for it.

        A text that was given up never comes back: the largest digest that is held out only falls. So
        one pass is enough, and no text stands on both sides.
        """
        if not self._count:
            return examples
        if len(self) < self._count:
            candidate_N = np.ones(len(examples), dtype=bool)
        else:
            largest = np.frombuffer(self._largest[0].digest, dtype=examples.digests_N.dtype)[0]
            candidate_N = examples.digests_N["high"] <= largest["high"]
        released = [examples.select(~candidate_N)]
        for index in np.flatnonzero(candidate_N).tolist():
            one_N = np.zeros(len(examples), dtype=bool)
            one_N[index] = True
            released += self._offer(examples.digests_N[index].tobytes(), examples.select(one_N))
        return join(released)

    def all(self) -> Examples:
        """Return the examples that are held out, in the order of their digests."""
        return join([example for digest in sorted(self._kept) for example in self._kept[digest]])

    def _offer(self, digest: bytes, example: Examples) -> list[Examples]:
        if digest in self._kept:
            self._kept[digest].append(example)
            return []
        if len(self) == self._count and digest > self._largest[0].digest:
            return [example]
        self._kept[digest] = [example]
        heapq.heappush(self._largest, _Reversed(digest))
        if len(self) <= self._count:
            return []
        return self._kept.pop(heapq.heappop(self._largest).digest)


class _Reversed:
    """A digest that sorts the other way round: `heapq` gives the smallest, and we need the largest."""

    __slots__ = ("digest",)

    def __init__(self, digest: bytes) -> None:
        self.digest = digest

    def __lt__(self, other: "_Reversed") -> bool:
        return self.digest > other.digest


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
