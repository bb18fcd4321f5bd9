"""Fast Hugging Face tokenizers: a folder with a `tokenizer.json`, loaded or trained."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dynmix.data.tokenizer.base import Encoding, Tokenizer, word_starts
from megatron_dynmix.data.tokenizer.special import TWIN, SpecialTokens, join_pieces
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


class FastTokenizer(Tokenizer):
    """A fast Hugging Face tokenizer that has an EOS token."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self._backend = hf_tokenizer.backend_tokenizer
        # A tokenizer.json may carry these settings, and they would cut or pad examples unseen.
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self.special = SpecialTokens({token.content: i for i, token in added.items() if token.special})
        # not len(): ids of added tokens may leave holes
        self.vocab_size = int(max(hf_tokenizer.get_vocab().values())) + 1
        self.eos, self.eos_id = str(hf_tokenizer.eos_token), int(hf_tokenizer.eos_token_id)
        puts_bos = hf_tokenizer("a")["input_ids"][0] == hf_tokenizer.bos_token_id
        self.bos = str(hf_tokenizer.bos_token) if puts_bos else ""
        self.pad_id = self.eos_id if hf_tokenizer.pad_token_id is None else int(hf_tokenizer.pad_token_id)
        self.chat_template = hf_tokenizer.chat_template
        self.fingerprint = sha256([self._backend.to_str(), self.chat_template, self.eos, self.bos])

    def __getstate__(self) -> dict[str, Any]:
        # a pickled backend forgets that it takes special tokens for text
        return {name: value for name, value in self.__dict__.items() if name != "_literal"}

    @property
    def template_names(self) -> dict[str, str]:  # noqa: D102
        return {name: str(token) for name, token in self._hf.special_tokens_map.items()}

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:  # noqa: D102
        plain = [text for text in texts if not self.special.is_guarded(text)]
        encodings = iter(self._backend.encode_batch(plain, add_special_tokens=False))
        return [
            self._encode_guarded(text) if self.special.is_guarded(text) else _encoding(text, next(encodings))
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=False))

    @cached_property
    def _literal(self) -> Backend:
        """A copy that takes special tokens for text, and knows each by a private character, its twin."""
        literal = Backend.from_str(self._backend.to_str())
        literal.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        kept, twins = ("lstrip", "rstrip", "single_word", "normalized"), []
        for number, i in enumerate(self.special.ids.values()):
            same = {name: getattr(added[i], name) for name in kept}
            twins.append(AddedToken(chr(TWIN + number), special=False, **same))
        literal.add_tokens(twins)
        return literal

    def _encode_guarded(self, text: str) -> Encoding:
        pieces = list(self.special.pieces(text))
        twins = {name: chr(TWIN + number) for number, name in enumerate(self.special.texts)}
        said, origin_C = join_pieces(
            pieces, [twins[piece.text] if piece.is_special else piece.text for piece in pieces]
        )
        encoding = self._literal.encode(said, add_special_tokens=False)
        of_twin = {self._literal.token_to_id(twin): self.special.ids[name] for name, twin in twins.items()}
        ids_T = np.array([of_twin.get(i, i) for i in encoding.ids], dtype=np.int64)
        # an unknown character is the one special token that plain text may become
        if forged := self.special_ids.intersection(encoding.ids) - {self._hf.unk_token_id}:
            raise InputError(
                f"the tokenizer makes its special token {self.decode(sorted(forged)[:1])!r} of the same "
                "letters in plain text; use a tokenizer that tells them apart, or take them out of the data"
            )
        return ids_T, origin_C[word_starts(said, encoding.offsets)]


def _encoding(text: str, encoding: Any) -> Encoding:
    ids_T = np.fromiter(encoding.ids, dtype=np.int64, count=len(encoding))
    return ids_T, word_starts(text, encoding.offsets)


def load_fast(name: str, source: str, trust_remote_code: bool, *, local: bool) -> FastTokenizer:
    """Load a Hugging Face tokenizer from a folder, or (unless ``local``) from the hub."""
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


def train_bpe(texts: Iterable[str], vocab_size: int, output_dir: str | Path) -> FastTokenizer:
    """Train a byte-level BPE and save it as a Hugging Face folder.

    The vocabulary holds ``<s>``, ``</s>`` (EOS), ``<pad>``, the 256 bytes, then merges. A small
    corpus may give fewer tokens than asked for: see ``vocab_size`` of the result. One without room for the
    special tokens and the bytes, or a folder that cannot be made, is an InputError.
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
    backend = Backend(models.BPE())
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
    return load_fast(str(output_dir), str(output_dir), trust_remote_code=False, local=True)
