"""The tokenizer, seen through the few things that data needs.

Shape legend: T tokens of one text, T2 with both ends of each.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.tokenizer.special import SpecialTokens

Encoding = tuple[NDArray[np.int64], NDArray[np.int64]]
"""``(ids_T, char_starts_T)`` of one text."""


class Tokenizer(ABC):
    """Token ids with character positions, and the special tokens that templates write.

    Texts are *guarded*: see ``special.py``. A literal special token in what people wrote never becomes
    that token.
    """

    special: SpecialTokens
    vocab_size: int
    """Smallest embedding size that holds every id, added tokens included."""
    eos: str
    bos: str
    """The token that this tokenizer itself puts before a text, or "" if it puts none."""
    eos_id: int
    pad_id: int
    """The EOS id where there is no padding token: padding is masked in any case."""
    chat_template: str | dict[str, str] | None = None
    fingerprint: str
    """SHA-256 over all that decides ids and templates; equal fingerprints give equal tokens."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Encode guarded texts, without adding special tokens.

        ``char_starts_T`` is where in the text a token begins, its leading spaces aside (a token of
        spaces only begins at its last one): tokenizers differ in whether their offsets count the
        space in front of a word, and loss masks must not depend on that.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that no text stands for: begin, end, roles, padding."""
        return frozenset(self.special.ids.values())

    @property
    def template_names(self) -> dict[str, str]:
        """The special tokens by the names that chat templates know them by, such as ``bos_token``."""
        return {"bos_token": self.bos, "eos_token": self.eos}


def word_starts(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return where each token begins, its leading spaces aside, given the character ranges of the tokens."""
    # not np.array: it takes twice as long for a list of pairs
    flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
    offsets_T2 = flat.reshape(-1, 2)
    starts_T, ends_T = offsets_T2[:, 0], offsets_T2[:, 1]
    is_space = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) == ord(" ")
    is_space = np.append(is_space, False)
    positions = np.where(is_space, len(text), np.arange(len(text) + 1))
    next_word = np.minimum.accumulate(positions[::-1])[::-1]
    word_starts_T = np.minimum(next_word[starts_T], np.maximum(ends_T - 1, starts_T))
    # With offsets trimmed by the tokenizer, a token of spaces only is an empty range behind them.
    behind_space_T = (starts_T == ends_T) & (starts_T > 0) & is_space[starts_T - 1]
    return np.where(behind_space_T, starts_T - 1, word_starts_T)
