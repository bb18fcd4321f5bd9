"""The tokenizer: a local Hugging Face folder, seen through the few things that data needs.

Shape legend: T tokens of one text.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dynmix.errors import InputError

_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
_NUM_BYTES = 256
# The space after the role belongs to the turn, not to the generation prompt, so that the first word of
# an answer keeps the token it has in running text.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\\n' }}"
    "{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ '\\nAssistant:' if add_generation_prompt else '' }}"
)


class Tokenizer:
    """Token ids with character positions; wraps a fast Hugging Face tokenizer that has an EOS token."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self._backend = hf_tokenizer.backend_tokenizer
        # A tokenizer.json may carry these settings, and they would cut or pad examples unseen.
        self._backend.no_truncation()
        self._backend.no_padding()

    @cached_property
    def vocab_size(self) -> int:
        """Smallest embedding size that holds every id, added tokens included."""
        # not len(): ids of added tokens may leave holes
        return int(max(self._hf.get_vocab().values())) + 1

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token."""
        return int(self._hf.eos_token_id)

    @cached_property
    def eos(self) -> str:
        """Text of the end-of-sequence token."""
        return str(self._hf.eos_token)

    @cached_property
    def bos(self) -> str:
        """Text of the token that this tokenizer itself puts before a text, or "" if it puts none."""
        first = self._hf("a")["input_ids"][0]
        return str(self._hf.bos_token) if first == self._hf.bos_token_id else ""

    @property
    def pad_id(self) -> int:
        """Id of the padding token; the EOS id where there is none (padding is masked in any case)."""
        return self.eos_id if self._hf.pad_token_id is None else int(self._hf.pad_token_id)

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder holds a chat template of its own."""
        return bool(self._hf.chat_template)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides ids and templates; equal fingerprints give equal tokens."""
        parts = [self._backend.to_str(), self._hf.chat_template, self.eos, self.bos]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return ``(ids_T, char_starts_T)`` for each text, without adding special tokens.

        ``char_starts_T`` is where in the text a token begins, its leading spaces aside (a token of
        spaces only begins at its last one): tokenizers differ in whether their offsets count the
        space in front of a word, and loss masks must not depend on that.
        """
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(encoding.ids, dtype=np.int64), _word_starts(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Return the tokenizer's own chat template filled with ``{"role", "content"}`` messages."""
        text = self._hf.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a Hugging Face tokenizer from a local folder; the network is never asked.

    Raises:
        InputError: no such folder, no tokenizer in it, not a fast one, or no EOS token.

    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"tokenizer {path}: not a folder; give a local one that holds tokenizer.json "
            "(nothing is downloaded)"
        )
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises bare Exception for a damaged tokenizer.json
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"tokenizer {path}: cannot be loaded ({reason}); the folder needs a Hugging Face tokenizer.json "
            "and tokenizer_config.json"
        ) from error
    if not getattr(hf_tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer {path}: a slow (pure Python) tokenizer, which gives no character offsets for loss "
            "masks; convert it so that the folder holds a tokenizer.json"
        )
    if hf_tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {path}: has no EOS token, so the end of an answer could not be learnt; "
            'set "eos_token" in its tokenizer_config.json'
        )
    return Tokenizer(hf_tokenizer)


def train_bpe(texts: Iterable[str], vocab_size: int, output_dir: str | Path) -> Tokenizer:
    """Train a byte-level BPE and save it as a Hugging Face folder that :func:`load_tokenizer` takes.

    The vocabulary holds ``<s>``, ``</s>`` (EOS), ``<pad>``, the 256 bytes, then merges. A small
    corpus may give fewer tokens than asked for: see ``vocab_size`` of the result.

    Raises:
        InputError: ``vocab_size`` has no room for the special tokens and the bytes.

    """
    specials = [_BOS, _EOS, _PAD]
    smallest = _NUM_BYTES + len(specials)
    if vocab_size < smallest:
        raise InputError(
            f"vocabulary size {vocab_size}: bytes and {len(specials)} special tokens alone need {smallest}"
        )
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    hf_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
    )
    hf_tokenizer.chat_template = _CHAT_TEMPLATE
    hf_tokenizer.save_pretrained(str(output_dir))
    return load_tokenizer(output_dir)


def _word_starts(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    offsets_T2 = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts_T, ends_T = offsets_T2[:, 0], offsets_T2[:, 1]
    is_space = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) == ord(" ")
    is_space = np.append(is_space, False)
    positions = np.where(is_space, len(text), np.arange(len(text) + 1))
    next_word = np.minimum.accumulate(positions[::-1])[::-1]
    word_starts_T = np.minimum(next_word[starts_T], np.maximum(ends_T - 1, starts_T))
    # With offsets trimmed by the tokenizer, a token of spaces only is an empty range behind them.
    behind_space_T = (starts_T == ends_T) & (starts_T > 0) & is_space[starts_T - 1]
    return np.where(behind_space_T, starts_T - 1, word_starts_T)
