"""Writing Megatron's ``.bin`` and ``.idx`` in constant memory, and the digests beside them.

Megatron-Core's own builder keeps some hundred bytes for each sequence until the end; here the index waits
in files of its own. The bytes are the same. Shape legend: Q sequences, N documents, T tokens.
"""

import shutil
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.index_file import index_head
from megatron_dynmix.data.prepare.examples import Examples
from megatron_dynmix.data.prepared import DIGEST_BYTES, file_of

_INDEX_PARTS = ("lengths", "starts", "ends", "modes")
"""Arrays of the index as they follow one another: tokens and first byte of each sequence, last sequence of
each document, mode of each sequence."""


class IndexedWriter(AbstractContextManager["IndexedWriter"]):
    """Writes examples to ``prefix.bin``, ``.idx`` and ``.digests``; one document each, modes as given."""

    def __init__(self, prefix: Path, dtype: type[np.integer]) -> None:
        self.examples = self.tokens = self.trained_tokens = 0
        self.max_length = 0
        """Tokens of the longest example."""
        self._prefix = prefix
        self._dtype = dtype
        self._sequences = 0
        with ExitStack() as opened:  # what was opened is closed if the next cannot be
            self._files: dict[str, IO[bytes]] = {
                name: opened.enter_context(file_of(prefix, name).open("wb"))
                for name in ("bin", "digests", *_INDEX_PARTS)
            }
            self._opened = opened.pop_all()
        self._files["ends"].write(
            bytes(8)
        )  # the list of documents begins with the 0 that the first starts at

    def add(self, examples: Examples) -> None:
        """Append examples."""
        assert examples.tokens_T.dtype == self._dtype, "a worker encoded with another type"
        bytes_Q = examples.lengths_Q.astype(np.int64) * self._dtype().itemsize
        arrays: dict[str, NDArray[Any]] = {
            "bin": examples.tokens_T,
            "digests": examples.digests_N,
            "lengths": examples.lengths_Q,
            "starts": self.tokens * self._dtype().itemsize + np.cumsum(bytes_Q) - bytes_Q,
            "modes": examples.modes_Q,
            "ends": self._sequences + np.cumsum(examples.sequences_N, dtype=np.int64),
        }
        for name, array in arrays.items():
            self._files[name].write(np.ascontiguousarray(array).data)
        self._sequences += len(examples.lengths_Q)
        self.examples += len(examples)
        self.tokens += len(examples.tokens_T)
        self.trained_tokens += int(examples.lengths_Q[examples.modes_Q == 1].sum())
        self.max_length = max(self.max_length, int(examples.sizes_N.max(initial=0)))

    def finish(self) -> None:
        """Write the index; the prefix is complete then."""
        for file in self._files.values():
            file.flush()
        with file_of(self._prefix, "idx").open("wb") as index:
            index.write(index_head(self._dtype, self._sequences, self.examples))
            for name in _INDEX_PARTS:
                part = file_of(self._prefix, name)
                with part.open("rb") as written:
                    shutil.copyfileobj(written, index)
                part.unlink()
        assert file_of(self._prefix, "digests").stat().st_size == self.examples * DIGEST_BYTES

    def __exit__(self, *raised: object) -> None:
        """Close the files, also where they cannot be flushed any more."""
        with suppress(OSError):  # the disk is full: what is in the buffer is lost, and the draft goes anyway
            self._opened.close()
