"""The tokenizer, seen through the few things that data needs.

Shape legend: T tokens of one text.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

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
    unk_id: int | None = None
    """Of the one special token that a text may become, where it has characters that are unknown."""
    pad_id: int
    """The EOS id where there is no padding token: padding is masked in any case."""
    chat_template: str | dict[str, str] | None = None
    fingerprint: str
    """SHA-256 over all that decides ids and templates; equal fingerprints give equal tokens."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, inside: bool = False) -> list[Encoding]:
        """Encode guarded texts, without adding special tokens; ``char_starts_T`` is where each begins.

        ``inside``: the texts go on from others, so that the space which some tokenizers put in front of a
        text's first word is not put there.
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
