"""The tokenizer, seen through the few things that data needs; a Hugging Face folder as a rule.

Shape legend: T tokens of one text, C its characters.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dynmix.config.run_config import HUB
from megatron_dynmix.data.tokenizer.special import TWIN, SpecialTokens
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import sha256

_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
_NUM_BYTES = 256
# The space after the role belongs to the turn, not to the generation prompt, so that the first word of
# an answer keeps the token it has in running text.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\\n' }}{{ message['role'].capitalize() + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{{ '\\nAssistant:' if add_generation_prompt else '' }}"
)


class Tokenizer(ABC):
    """Token ids with character positions, and the special tokens that templates write.

    Texts are *guarded*: see ``special.py``. A literal special token in what people wrote never becomes
    that token.
    """

    special: SpecialTokens
    chat_template: str | dict[str, str] | None = None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Smallest embedding size that holds every id, added tokens included."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """Id of the end-of-sequence token."""

    @property
    @abstractmethod
    def eos(self) -> str:
        """Text of the end-of-sequence token."""

    @property
    @abstractmethod
    def bos(self) -> str:
        """Text of the token that this tokenizer itself puts before a text, or "" if it puts none."""

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """Id of the padding token; the EOS id where there is none (padding is masked in any case)."""

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over all that decides ids and templates; equal fingerprints give equal tokens."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return ``(ids_T, char_starts_T)`` for each guarded text, without adding special tokens.

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
    def has_chat_template(self) -> bool:
        """Whether it comes with a chat template of its own."""
        return bool(self.chat_template)

    @property
    def template_names(self) -> dict[str, str]:
        """The special tokens by the names that chat templates know them by, such as ``bos_token``."""
        return {"bos_token": self.bos, "eos_token": self.eos}


class FastTokenizer(Tokenizer):
    """A fast Hugging Face tokenizer that has an EOS token."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self._backend = hf_tokenizer.backend_tokenizer
        # A tokenizer.json may carry these settings, and they would cut or pad examples unseen.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.chat_template = hf_tokenizer.chat_template
        added = self._backend.get_added_tokens_decoder()
        self.special = SpecialTokens({token.content: i for i, token in added.items() if token.special})

    def __getstate__(self) -> dict[str, Any]:
        # a pickled backend forgets that it takes special tokens for text
        return {name: value for name, value in self.__dict__.items() if name != "_literal"}

    @cached_property
    def vocab_size(self) -> int:  # noqa: D102
        # not len(): ids of added tokens may leave holes
        return int(max(self._hf.get_vocab().values())) + 1

    @property
    def eos_id(self) -> int:  # noqa: D102
        return int(self._hf.eos_token_id)

    @cached_property
    def eos(self) -> str:  # noqa: D102
        return str(self._hf.eos_token)

    @cached_property
    def bos(self) -> str:  # noqa: D102
        first = self._hf("a")["input_ids"][0]
        return str(self._hf.bos_token) if first == self._hf.bos_token_id else ""

    @property
    def pad_id(self) -> int:  # noqa: D102
        return self.eos_id if self._hf.pad_token_id is None else int(self._hf.pad_token_id)

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102
        parts = [self._backend.to_str(), self.chat_template, self.eos, self.bos]
        return sha256(parts)

    @property
    def template_names(self) -> dict[str, str]:  # noqa: D102
        return {name: str(token) for name, token in self._hf.special_tokens_map.items()}

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:  # noqa: D102
        encoded: list[tuple[NDArray[np.int64], NDArray[np.int64]] | None] = [None] * len(texts)
        plain = [number for number, text in enumerate(texts) if not self.special.is_guarded(text)]
        encodings = self._backend.encode_batch([texts[number] for number in plain], add_special_tokens=False)
        for number, encoding in zip(plain, encodings, strict=True):
            ids_T = np.fromiter(encoding.ids, dtype=np.int64, count=len(encoding))
            encoded[number] = (ids_T, word_starts(texts[number], encoding.offsets))
        return [
            self._encode_guarded(text) if one is None else one
            for text, one in zip(texts, encoded, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=False))

    @cached_property
    def _literal(self) -> BackendTokenizer:
        """A copy that takes special tokens for text, and knows each by a private character, its twin."""
        literal = BackendTokenizer.from_str(self._backend.to_str())
        literal.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        literal.add_tokens(
            [
                AddedToken(
                    chr(TWIN + number),
                    lstrip=added[i].lstrip,
                    rstrip=added[i].rstrip,
                    single_word=added[i].single_word,
                    normalized=added[i].normalized,
                    special=False,
                )
                for number, i in enumerate(self.special.ids.values())
            ]
        )
        return literal

    def _encode_guarded(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        pieces = list(self.special.pieces(text))
        twins = {name: chr(TWIN + number) for number, name in enumerate(self.special.texts)}
        written = [twins[piece.text] if piece.is_special else piece.text for piece in pieces]
        # where each character of what is encoded stands in the guarded text
        origins = [
            np.full(len(said), piece.start)
            if piece.is_special or piece.is_guard
            else np.arange(piece.start, piece.start + len(said))
            for piece, said in zip(pieces, written, strict=True)
        ]
        joined = "".join(written)
        encoding = self._literal.encode(joined, add_special_tokens=False)
        of_twin = {self._literal.token_to_id(twin): self.special.ids[name] for name, twin in twins.items()}
        ids_T = np.array([of_twin.get(i, i) for i in encoding.ids], dtype=np.int64)
        # an unknown character is the one special token that plain text may become
        if forged := self.special_ids.intersection(encoding.ids) - {self._hf.unk_token_id}:
            raise InputError(
                f"the tokenizer makes its special token {self.decode(sorted(forged)[:1])!r} of the same "
                "letters in plain text; use a tokenizer that tells them apart, or take them out of the data"
            )
        origin_C = np.append(np.concatenate(origins), len(text))
        return ids_T, origin_C[word_starts(joined, encoding.offsets)]


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load a tokenizer: a Hugging Face folder, a SentencePiece ``.model`` or a ``.tiktoken`` file.

    ``hf://ORGANISATION/NAME`` fetches one from the Hugging Face hub; for anything else the network is
    never asked. ``trust_remote_code`` lets Hugging Face run Python code that comes with the tokenizer.

    Raises:
        InputError: no such file, no tokenizer in it, not a fast one, or no EOS token.

    """
    name = str(path)
    if name.startswith(HUB):
        return _load_fast(name, name.removeprefix(HUB), trust_remote_code, local=False)
    path = Path(path)
    if path.is_dir():
        return _load_fast(name, name, trust_remote_code, local=True)
    if not path.is_file():
        raise InputError(
            f"tokenizer {path}: not a folder, nor a file; give a local folder that holds tokenizer.json, a "
            f"SentencePiece .model or a .tiktoken file ({HUB}ORGANISATION/NAME is downloaded)"
        )
    # here, not above: they are built on this module, and bring libraries that few need
    from megatron_dynmix.data.tokenizer import pieces as piece_tokenizers

    if path.suffix == ".model":
        return piece_tokenizers.SentencePieceTokenizer(path)
    if path.suffix == ".tiktoken":
        return piece_tokenizers.TiktokenTokenizer(path)
    raise InputError(
        f"tokenizer {path}: a file that is neither .model (SentencePiece) nor .tiktoken; for a "
        "tokenizer.json give the folder that it lies in"
    )


def _load_fast(name: str, source: str, trust_remote_code: bool, *, local: bool) -> FastTokenizer:
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=local, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library raises bare Exception for a damaged tokenizer.json
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"tokenizer {name}: cannot be loaded ({reason}); the folder needs a Hugging Face tokenizer.json "
            "and tokenizer_config.json"
        ) from error
    if not getattr(hf_tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer {name}: a slow (pure Python) tokenizer, which gives no character offsets for loss "
            "masks; convert it so that the folder holds a tokenizer.json"
        )
    if hf_tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name}: has no EOS token, so the end of an answer could not be learnt; "
            'set "eos_token" in its tokenizer_config.json'
        )
    return FastTokenizer(hf_tokenizer)


def train_bpe(texts: Iterable[str], vocab_size: int, output_dir: str | Path) -> Tokenizer:
    """Train a byte-level BPE and save it as a Hugging Face folder that :func:`load_tokenizer` takes.

    The vocabulary holds ``<s>``, ``</s>`` (EOS), ``<pad>``, the 256 bytes, then merges. A small
    corpus may give fewer tokens than asked for: see ``vocab_size`` of the result.

    Raises:
        InputError: ``vocab_size`` has no room for the special tokens and the bytes, or there is no such
            folder and none can be made.

    """
    specials = [_BOS, _EOS, _PAD]
    smallest = _NUM_BYTES + len(specials)
    if vocab_size < smallest:
        raise InputError(
            f"vocabulary size {vocab_size}: bytes and {len(specials)} special tokens alone need {smallest}"
        )
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output_dir}: is no folder to write to ({error.strerror}); give one") from error
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
