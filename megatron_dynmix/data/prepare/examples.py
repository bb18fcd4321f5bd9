"""A run of encoded examples as flat arrays: what workers hand over, what is held out, what goes to disk.

Shape legend: N examples, Q sequences of all of them (runs of equally trained tokens), T tokens of all.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.prepared import DIGEST


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
    """Holds out for the probe the ``count`` distinct texts with the smallest digests, with all their copies.

    A digest is as good as a random number and does not change when rows are appended or reordered: of n
    examples, k new ones put back into training about k / (n + k) of those that were held out.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._examples: dict[bytes, list[Examples]] = {}
        self._digests: list[bytes] = []
        """In their order, the largest last."""

    def __len__(self) -> int:
        """Return the number of distinct texts that are held out."""
        return len(self._digests)

    def sift(self, examples: Examples) -> Examples:
        """Take what is to be held out so far, and return the others with what is given up for it.

        A text that was given up never comes back: the largest digest that is held out only falls. So
        one pass is enough, and no text is on both sides.
        """
        if not self._count:
            return examples
        if len(self) < self._count:
            candidate_N = np.ones(len(examples), dtype=bool)
        else:
            largest = np.frombuffer(self._digests[-1], dtype=examples.digests_N.dtype)[0]
            candidate_N = examples.digests_N["high"] <= largest["high"]
        released = [examples.select(~candidate_N)]
        for index in np.flatnonzero(candidate_N).tolist():
            one_N = np.zeros(len(examples), dtype=bool)
            one_N[index] = True
            released += self._offer(examples.digests_N[index].tobytes(), examples.select(one_N))
        return join(released)

    def all(self) -> Examples:
        """Return the examples that are held out, in the order of their digests."""
        return join([example for digest in self._digests for example in self._examples[digest]])

    def _offer(self, digest: bytes, example: Examples) -> list[Examples]:
        """Hold an example out if its digest is among the smallest, and return what is not held out for it."""
        if digest in self._examples:
            self._examples[digest].append(example)
            return []
        if len(self) == self._count and digest > self._digests[-1]:
            return [example]
        self._examples[digest] = [example]
        insort(self._digests, digest)
        return self._examples.pop(self._digests.pop()) if len(self) > self._count else []
