"""Rows of a file -> examples: what one worker of `prepare` does.

Nothing here imports Megatron-Core, so that a worker starts fast and stays small.
Shape legend: N examples of a chunk, T tokens of one example.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.prepare.conversation import Conversation
from megatron_dynmix.data.prepare.examples import DIGEST_BYTES, Examples, pack_examples
from megatron_dynmix.data.prepare.formats import Format
from megatron_dynmix.data.prepare.readers import RawRow
from megatron_dynmix.data.prepare.split import split_conversation
from megatron_dynmix.data.prepare.template import Rendered, Renderer, token_mask
from megatron_dynmix.errors import InputError


class Chunk(NamedTuple):
    """Rows of one file that follow one another, the format of the file, and how many bytes they are."""

    rows: list[RawRow]
    format: Format
    size: int


class _Read(NamedTuple):
    place: str
    conversation: Conversation
    rendered: Rendered


class BadRow(NamedTuple):
    """A row that is not written: ``file:line``, and why."""

    place: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What became of a chunk's rows.

    ``broken`` rows hold no usable conversation, ``untrained`` ones no token to train on. ``split``
    conversations became ``split_parts`` examples. ``size`` is the bytes that were read.
    """

    rows: int
    size: int
    examples: Examples
    broken: tuple[BadRow, ...]
    untrained: tuple[BadRow, ...]
    split: int
    split_parts: int


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns rows into examples; a copy of it goes to every worker.

    ``split_length`` is the positions of a row above which conversations are split, None for never.
    """

    renderer: Renderer
    split_length: int | None
    dtype: type[np.integer]

    def __call__(self, chunk: Chunk) -> Encoded:
        """Encode a chunk of rows.

        Raises:
            InputError: the template does not fit; the message names the row.

        """
        broken: list[BadRow] = []
        read: list[_Read] = []
        for row in chunk.rows:
            try:
                conversation = chunk.format.parse(row.parse())
                rendered = self.renderer.render(conversation)
            except InputError as error:
                raise InputError(f"{row.place}: {error}") from error
            except ValueError as error:
                broken.append(BadRow(row.place, str(error)))
                continue
            except RecursionError:
                broken.append(BadRow(row.place, "not usable: nested too deeply"))
                continue
            read.append(_Read(row.place, conversation, rendered))
        return self._encode(chunk, read, broken)

    def _encode(self, chunk: Chunk, read: list[_Read], broken: list[BadRow]) -> Encoded:
        untrained: list[BadRow] = []
        split = split_parts = 0
        written: list[tuple[NDArray[np.integer], NDArray[np.bool_], bytes]] = []
        encoded = self._tokens([row.rendered for row in read])
        for (place, conversation, rendered), (ids_T, trained_T) in zip(read, encoded, strict=True):
            parts, tokens = [rendered], [(ids_T, trained_T)]
            if self.split_length is not None and len(ids_T) - 1 > self.split_length:
                parts, tokens = self._split(conversation)
                split += len(parts) > 1
                split_parts += len(parts) if len(parts) > 1 else 0
            for part, (part_ids_T, part_trained_T) in zip(parts, tokens, strict=True):
                if part_trained_T.any():
                    digest = hashlib.blake2b(part.text.encode(), digest_size=DIGEST_BYTES).digest()
                    written.append((part_ids_T, part_trained_T, digest))
                else:
                    untrained.append(BadRow(place, "no token to train on"))
        return Encoded(
            rows=len(chunk.rows),
            size=chunk.size,
            examples=pack_examples(
                [ids_T for ids_T, _, _ in written],
                [trained_T for _, trained_T, _ in written],
                [digest for _, _, digest in written],
                self.dtype,
            ),
            broken=tuple(broken),
            untrained=tuple(untrained),
            split=split,
            split_parts=split_parts,
        )

    def _tokens(self, rendered: Sequence[Rendered]) -> list[tuple[NDArray[np.integer], NDArray[np.bool_]]]:
        encoded = self.renderer.tokenizer.encode_batch([one.text for one in rendered])
        return [
            (ids_T, token_mask(char_starts_T, one.trained_spans))
            for one, (ids_T, char_starts_T) in zip(rendered, encoded, strict=True)
        ]

    def _split(
        self, conversation: Conversation
    ) -> tuple[list[Rendered], list[tuple[NDArray[np.integer], NDArray[np.bool_]]]]:
        assert self.split_length is not None, "asked for by the caller"

        def tokens(part: Conversation) -> int:
            return len(self._tokens([self.renderer.render(part)])[0][0])

        parts = split_conversation(conversation, self.split_length + 1, tokens)
        rendered = [self.renderer.render(part) for part in parts]
        return rendered, self._tokens(rendered)
