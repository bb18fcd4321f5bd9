"""A run of encoded examples as flat arrays: what workers hand over, and what goes to disk.

Shape legend: N examples, Q sequences of all of them (runs of equally trained tokens), T tokens of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
