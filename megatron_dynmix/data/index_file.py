"""Megatron's index of tokens on disk, `.idx`: which bytes of `.bin` are which sequence of which document.

Megatron-Core reads it in training. Preparing needs no more of it than stands here, and no torch.
Shape legend: Q sequences, D1 = documents + 1.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.prepared import file_of

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_CODES: dict[type[np.integer], int] = {np.int32: 4, np.uint16: 8}
_COUNTS = struct.Struct("<QBQQ")
"""Version, code of the type of the tokens, sequences, documents + 1."""
_MOST_SHORT = 65_500


class SequenceIndex(NamedTuple):
    """Tokens and mode of each sequence, and the number of the sequence that each document begins with."""

    lengths_Q: NDArray[np.int32]
    documents_D1: NDArray[np.int64]
    modes_Q: NDArray[np.int8]


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Return the type that Megatron stores tokens of such a vocabulary in."""
    return np.uint16 if vocab_size < _MOST_SHORT else np.int32


def index_head(dtype: type[np.integer], sequences: int, documents: int) -> bytes:
    """Return what stands before the arrays: lengths, first bytes, documents, modes."""
    return _MAGIC + _COUNTS.pack(_VERSION, _CODES[dtype], sequences, documents + 1)


def read_index(prefix: Path) -> SequenceIndex:
    """Read the index of a prepared source, whose report has vouched for it."""
    path, start = file_of(prefix, "idx"), len(_MAGIC) + _COUNTS.size
    with path.open("rb") as file:
        _, _, sequences, borders = _COUNTS.unpack(file.read(start)[len(_MAGIC) :])
    documents = start + (4 + 8) * sequences  # behind lengths and first bytes
    return SequenceIndex(
        np.fromfile(path, np.int32, sequences, offset=start),
        np.fromfile(path, np.int64, borders, offset=documents),
        np.fromfile(path, np.int8, sequences, offset=documents + 8 * borders),
    )
