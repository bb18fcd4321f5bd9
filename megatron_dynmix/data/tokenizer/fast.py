"""Fast Hugging Face tokenizers: a folder with a `tokenizer.json`, loaded or trained."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from megatron_dynmix.data.tokenizer.base import Encoding, Tokenizer
from megatron_dynmix.data.tokenizer.folder import TokenizerFiles, read_folder
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
    """A fast Hugging Face tokenizer that has an EOS token; its backend becomes its own, and is changed."""

    def __init__(self, files: TokenizerFiles) -> None:
        backend, names, self.chat_template = files
        # A tokenizer.json may carry these settings, and they would cut or pad examples unseen.
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._names = backend, names
        # not its size: ids of added tokens may leave holes
        self.vocab_size = int(max(backend.get_vocab(with_added_tokens=True).values())) + 1
        added = backend.get_added_tokens_decoder()
        by_text = {token.content: i for i, token in added.items()}
        special = {text: i for text, i in by_text.items() if added[i].special or text in names.values()}
        self.special = SpecialTokens(special)
        self.eos, self.eos_id = names["eos_token"], special[names["eos_token"]]
        self.pad_id = special[names.get("pad_token", self.eos)]
        self.unk_id = special.get(names.get("unk_token", ""))
        bos = names.get("bos_token")
        puts_bos = bos is not None and backend.encode("a").ids[:1] == [special[bos]]
        self.bos = bos if bos is not None and puts_bos else ""
        self.fingerprint = sha256([backend.to_str(), self.chat_template, self.eos, self.bos])
        # it adds tokens, which nobody asks for, and may trim offsets
        backend.post_processor = None
        self._twins = _add_twins(backend, self.special)
        self._inside = _without_prefix(backend)

    @property
    def template_names(self) -> dict[str, str]:  # noqa: D102
        return self._names

    def encode_batch(self, texts: Sequence[str], *, inside: bool = False) -> list[Encoding]:  # noqa: D102
        if inside:
            with self._putting_no_prefix():
                return self.encode_batch(texts)
        plain = [text for text in texts if not self.special.is_guarded(text)]
        encodings = iter(self._backend.encode_batch(plain, add_special_tokens=False))
        return [
            self._encode_guarded(text) if self.special.is_guarded(text) else _encoding(next(encodings))
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def _encode_guarded(self, text: str) -> Encoding:
        """Encode with special tokens taken for text, each known by a private character, its twin."""
        pieces = list(self.special.pieces(text))
        number_of = {name: number for number, name in enumerate(self.special.texts)}
        said, origin_C = join_pieces(
            pieces,
            [chr(TWIN + number_of[piece.text]) if piece.is_special else piece.text for piece in pieces],
        )
        self._backend.encode_special_tokens = True
        encoding = self._backend.encode(said, add_special_tokens=False)
        self._backend.encode_special_tokens = False
        ids_T = np.array([self._twins.get(i, i) for i in encoding.ids], dtype=np.int64)
        if forged := self.special_ids.intersection(encoding.ids) - {self.unk_id}:
            raise InputError(
                f"the tokenizer makes its special token {self.decode(sorted(forged)[:1])!r} of the same "
                "letters in plain text; use a tokenizer that tells them apart, or take them out of the data"
            )
        return ids_T, origin_C[_encoding(encoding)[1]]

    @contextmanager
    def _putting_no_prefix(self) -> Iterator[None]:
        backend = self._backend
        usual = backend.normalizer, backend.pre_tokenizer
        backend.normalizer, backend.pre_tokenizer = self._inside
        try:
            yield
        finally:
            backend.normalizer, backend.pre_tokenizer = usual


def _encoding(encoding: Any) -> Encoding:
    ids_T = np.fromiter(encoding.ids, dtype=np.int64, count=len(encoding))
    starts = map(itemgetter(0), encoding.offsets)
    return ids_T, np.fromiter(starts, dtype=np.int64, count=len(encoding))


def _add_twins(backend: Backend, special: SpecialTokens) -> dict[int, int]:
    """Add a private character for each special token, and return the ids of both: twin -> special token."""
    added = backend.get_added_tokens_decoder()
    kept, twins = ("lstrip", "rstrip", "single_word", "normalized"), []
    for number, i in enumerate(special.ids.values()):
        same = {name: getattr(added[i], name) for name in kept}
        twins.append(AddedToken(chr(TWIN + number), special=False, **same))
    backend.add_tokens(twins)
    all_added = backend.get_added_tokens_decoder()
    of_twin = {token.content: special.ids[name] for name, token in zip(special.texts, twins, strict=True)}
    return {i: of_twin[token.content] for i, token in all_added.items() if token.content in of_twin}


def _without_prefix(backend: Backend) -> tuple[Any, Any]:
    """Return normalizer and pre-tokenizer as they are, but that they put no space in front of a text."""
    parts = {
        name: None if part is None else _prefixless(json.loads(part.__getstate__()))
        for name, part in (("normalizer", backend.normalizer), ("pre_tokenizer", backend.pre_tokenizer))
    }
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    same = Backend.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": empty, **parts}))
    return same.normalizer, same.pre_tokenizer


def _prefixless(part: Any) -> Any:
    if isinstance(part, list):
        return [_prefixless(one) for one in part if one.get("type") != "Prepend"]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: never.get(key, _prefixless(value)) for key, value in part.items()}


def load_fast(name: str, source: str, trust_remote_code: bool, *, local: bool) -> FastTokenizer:
    """Load a Hugging Face tokenizer from a folder, or (unless ``local``) from the hub."""
    files = read_folder(name, source, trust_remote_code, local=local)
    if "eos_token" not in files.names:
        raise InputError(
            f"tokenizer {name}: has no EOS token, so the end of an answer could not be learnt; "
            'set "eos_token" in its tokenizer_config.json'
        )
    return FastTokenizer(files)


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
    folder = Path(output_dir)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 knows, too
        **{"bos_token": _BOS, "eos_token": _EOS, "pad_token": _PAD},
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    return load_fast(str(output_dir), str(output_dir), trust_remote_code=False, local=True)
