"""Writing Megatron's ``.bin`` and ``.idx`` in constant memory, and the digests beside them.

Megatron-Core's own builder keeps some hundred bytes for each sequence until the end; here the index waits
in files of its own. The bytes are the same. Shape legend: Q sequences, N documents, T tokens.
"""

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType
from numpy.typing import NDArray

from megatron_dynmix.data.prepare.examples import Examples
from megatron_dynmix.data.prepared import DIGEST_BYTES, file_of

_INDEX_VERSION = 1
_PIECE_BYTES = 1 << 20


class IndexedWriter(AbstractContextManager["IndexedWriter"]):
    """Writes examples to ``prefix.bin``, ``.idx`` and ``.digests``; one document each, modes as given."""

    def __init__(self, prefix: Path, dtype: type[np.integer]) -> None:
        self.documents = 0
        self._prefix = prefix
        self._dtype = dtype
        self._sequences = 0
        with ExitStack() as opened:  # what was opened is closed if the next cannot be
            self._files: dict[str, IO[bytes]] = {
                name: opened.enter_context(file_of(prefix, name).open("wb"))
                for name in ("bin", "digests", "lengths", "modes", "ends")
            }
            self._opened = opened.pop_all()

    def add(self, examples: Examples) -> None:
        """Append examples."""
        assert examples.tokens_T.dtype == self._dtype, "a worker encoded with another type"
        ends_N = self._sequences + np.cumsum(examples.sequences_N, dtype=np.int64)
        arrays: dict[str, NDArray[Any]] = {
            "bin": examples.tokens_T,
            "digests": examples.digests_N,
            "lengths": examples.lengths_Q,
            "modes": examples.modes_Q,
            "ends": ends_N,
        }
        for name, array in arrays.items():
            self._files[name].write(np.ascontiguousarray(array).data)
        self._sequences += len(examples.lengths_Q)
        self.documents += len(examples)

    def finish(self) -> None:
        """Write the index; the prefix is complete then."""
        for file in self._files.values():
            file.flush()
        with file_of(self._prefix, "idx").open("wb") as index:
            index.write(_INDEX_HEADER)
            index.write(struct.pack("<QB", _INDEX_VERSION, DType.code_from_dtype(self._dtype)))
            # the document list begins with the 0 that the first one starts at
            index.write(struct.pack("<QQ", self._sequences, self.documents + 1))
            for piece in self._pieces("lengths"):
                index.write(piece)
            written = 0
            for piece in self._pieces("lengths"):
                bytes_Q = np.frombuffer(piece, dtype=np.int32).astype(np.int64) * DType.size(self._dtype)
                ends_Q = written + np.cumsum(bytes_Q)
                index.write((ends_Q - bytes_Q).tobytes())
                written = int(ends_Q[-1])
            index.write(struct.pack("<q", 0))
            for name in ("ends", "modes"):
                for piece in self._pieces(name):
                    index.write(piece)
        for name in ("lengths", "modes", "ends"):
            file_of(self._prefix, name).unlink()
        assert file_of(self._prefix, "digests").stat().st_size == self.documents * DIGEST_BYTES

    def __exit__(self, *raised: object) -> None:
        """Close the files, also where they cannot be flushed any more."""
        with suppress(OSError):  # the disk is full: what is in the buffer is lost, and the draft goes anyway
            self._opened.close()

    def _pieces(self, name: str) -> Iterator[bytes]:
        with file_of(self._prefix, name).open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
