"""Tokenizers that are one file: SentencePiece's `.model`, and tiktoken's ranks.

Their libraries never make a special token of text, so a guarded text is cut at its special tokens, and what
is between them is encoded as it is. Shape legend: T tokens of one text.
"""

import base64
import binascii
import json
from abc import abstractmethod
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_dynmix.data.tokenizer.base import Encoding, Tokenizer
from megatron_dynmix.data.tokenizer.special import SpecialTokens, join_pieces
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import sha256


class PieceTokenizer(Tokenizer):
    """A tokenizer that encodes what is between special tokens by itself."""

    def __init__(
        self, special: SpecialTokens, *, vocab_size: int, eos: str, bos: str, pad: str | None, digest: str
    ) -> None:
        self.special, self.vocab_size = special, vocab_size
        self.eos, self.bos, self.eos_id = eos, bos, special.ids[eos]
        self.pad_id = self.eos_id if pad is None else special.ids[pad]
        self.fingerprint = sha256(f"{type(self).__name__} {digest}")

    def encode_batch(self, texts: Sequence[str], *, inside: bool = False) -> list[Encoding]:  # noqa: D102
        return [self._encode(text, inside) for text in texts]

    def _encode(self, text: str, inside: bool) -> Encoding:
        empty = np.empty(0, dtype=np.int64)
        ids, starts = [empty], [empty]
        for is_special, run in groupby(self.special.pieces(text), key=lambda piece: piece.is_special):
            pieces = list(run)
            if is_special:
                ids.append(np.array([self.special.ids[piece.text] for piece in pieces]))
                starts.append(np.array([piece.start for piece in pieces]))
                continue
            # literal special tokens are part of the words around them
            said, origin_C = join_pieces(pieces, [piece.text for piece in pieces])
            ids_T, starts_T = self._encode_text(said, inside and pieces[0].start == 0)
            ids.append(ids_T)
            starts.append(origin_C[starts_T])
        return np.concatenate(ids), np.concatenate(starts)

    @abstractmethod
    def _encode_text(self, text: str, inside: bool) -> Encoding:
        """Encode a text without special tokens."""


class SentencePieceTokenizer(PieceTokenizer):
    """A SentencePiece model; its control symbols are the special tokens, and its BOS stands before a text."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise InputError(
                f"tokenizer {path}: no SentencePiece model ({str(error).strip()}); a file of ranks, as "
                "Llama 3 has, must be named .tiktoken"
            ) from error
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
        self._trims = bool(proto.normalizer_spec.remove_extra_whitespaces)
        proto.normalizer_spec.add_dummy_prefix = False
        self._unprefixed = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        model = self._model
        if model.eos_id() < 0:
            raise InputError(
                f"tokenizer {path}: has no EOS token, so no end of an answer could be learnt; use another"
            )
        control = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
        super().__init__(
            SpecialTokens(control),
            vocab_size=model.vocab_size(),
            eos=model.id_to_piece(model.eos_id()),
            bos=model.id_to_piece(model.bos_id()) if model.bos_id() >= 0 else "",
            pad=model.id_to_piece(model.pad_id()) if model.pad_id() >= 0 else None,
            digest=sha256(content),
        )

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        text = ""
        for is_special, run in groupby(map(int, ids), key=self.special_ids.__contains__):
            tokens = list(run)  # the library leaves control symbols out
            text += self._model.decode(tokens) if not is_special else "".join(self._model.id_to_piece(tokens))
        return text

    def _encode_text(self, text: str, inside: bool) -> Encoding:
        # leading space that is taken away stands for the one that is put in front
        model = self._unprefixed if inside and not (self._trims and text[:1].isspace()) else self._model
        encoded = model.encode(text, return_type="offset_mapping", return_bytes=False)
        starts = [start for start, _ in encoded["offsets"]]
        return np.array(encoded["ids"], dtype=np.int64), np.array(starts, dtype=np.int64)


class TiktokenTokenizer(PieceTokenizer):
    """Ranks of byte pairs, with what they do not say in a JSON file beside them: `NAME.tiktoken.json`.

    That file holds ``pattern`` (the regular expression that cuts words), ``special_tokens`` (text to id),
    ``eos_token``, and, if there are any, ``bos_token`` and ``pad_token``.
    """

    def __init__(self, path: Path) -> None:
        try:
            import tiktoken
        except ImportError:
            raise InputError(
                f"tokenizer {path}: needs the package tiktoken; pip install 'megatron-dynmix[tiktoken]'"
            ) from None
        content, settings = path.read_bytes(), _tiktoken_settings(path)
        special = SpecialTokens(settings["special_tokens"])
        try:
            pairs = (line.split() for line in content.splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            self._encoding = tiktoken.Encoding(
                str(path), pat_str=settings["pattern"], mergeable_ranks=ranks, special_tokens=special.ids
            )
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"tokenizer {path}: not a file of ranks ({error}); each line must hold a token in base64 and "
                "its rank"
            ) from error
        digest = sha256(content + json.dumps(settings, sort_keys=True).encode())
        super().__init__(
            special,
            vocab_size=self._encoding.n_vocab,
            eos=settings["eos_token"],
            bos=settings.get("bos_token") or "",
            pad=settings.get("pad_token"),
            digest=digest,
        )

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return str(self._encoding.decode([int(token) for token in ids]))

    def _encode_text(self, text: str, inside: bool) -> Encoding:
        ids = self._encoding.encode_ordinary(text)
        _, starts = self._encoding.decode_with_offsets(ids)
        return np.array(ids, dtype=np.int64), np.array(starts, dtype=np.int64)


def _tiktoken_settings(path: Path) -> dict[str, Any]:
    beside = path.with_name(f"{path.name}.json")
    shape = '{"pattern": ..., "special_tokens": {"<|endoftext|>": 100257}, "eos_token": "<|endoftext|>"}'
    try:
        settings = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"tokenizer {path}: holds ranks only, and {beside.name} beside it cannot be read ({error}); "
            f"write what belongs to the ranks there: {shape}"
        ) from error
    special = settings.get("special_tokens") if isinstance(settings, dict) else None
    good = (
        isinstance(special, dict)
        and all(isinstance(number, int) for number in special.values())
        and isinstance(settings.get("pattern"), str)
        and settings.get("eos_token") in special
        and all(settings.get(name) in (None, *special) for name in ("bos_token", "pad_token"))
    )
    if not good:
        raise InputError(f"{beside}: must hold {shape}, and bos_token and pad_token only of special_tokens")
    return dict(settings)
