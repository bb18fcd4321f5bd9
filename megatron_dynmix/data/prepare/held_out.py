"""Holding out examples for the probe: those with the smallest digests, so a source's own text decides.

A digest is as good as a random number and does not change when rows are appended or reordered: of n
examples, k new ones put back into training about k / (n + k) of those that were held out.
"""

import heapq

import numpy as np

from megatron_dynmix.data.prepare.examples import Examples, join


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
