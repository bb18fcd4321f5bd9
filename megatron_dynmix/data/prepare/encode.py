"""Rows of a file -> examples: what one worker of `prepare` does.

Nothing here imports Megatron-Core, so that a worker starts fast and stays small.
Shape legend: N examples of a chunk, T tokens of one example.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.examples import Examples, pack_examples
from megatron_dynmix.data.prepare.formats import Format
from megatron_dynmix.data.prepare.readers import RawRow
from megatron_dynmix.data.prepare.template import Rendered, Renderer, token_mask
from megatron_dynmix.data.prepared import DIGEST_BYTES
from megatron_dynmix.errors import InputError


class RowChunk(NamedTuple):
    """Rows of one file that follow one another, the format of the file, and how many bytes they are."""

    rows: list[RawRow]
    format: Format
    size: int


Masked = tuple[NDArray[np.integer], NDArray[np.bool_]]
"""Tokens ``ids_T`` and ``trained_T``, whether each is trained on."""


class _Read(NamedTuple):
    place: str
    conversation: Conversation
    rendered: Rendered


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What became of a chunk's rows.

    ``broken`` rows hold no usable conversation, ``untrained`` ones no token to train on: each as
    ``file:line: reason``. ``split`` conversations became ``split_parts`` examples. ``size`` is the bytes
    that were read.
    """

    rows: int
    size: int
    examples: Examples
    broken: list[str]
    untrained: list[str]
    split: int
    split_parts: int


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples; a copy of it goes to every worker.

    ``split_length`` is the positions of a row above which conversations are split, None for never.
    """

    renderer: Renderer
    split_length: int | None
    dtype: type[np.integer]

    def __call__(self, chunk: RowChunk) -> Encoded:
        """Encode a chunk of rows.

        Raises:
            InputError: the template does not fit; the message names the row.

        """
        broken: list[str] = []
        read: list[_Read] = []
        for row in chunk.rows:
            try:
                conversation = chunk.format.parse(row.parse())
                rendered = self.renderer.render(conversation)
            except InputError as error:
                raise InputError(f"{row.place}: {error}") from error
            except ValueError as error:
                broken.append(f"{row.place}: {error}")
                continue
            except RecursionError:
                broken.append(f"{row.place}: not usable: nested too deeply")
                continue
            read.append(_Read(row.place, conversation, rendered))
        return self._encode(chunk, read, broken)

    def _encode(self, chunk: RowChunk, read: list[_Read], broken: list[str]) -> Encoded:
        untrained: list[str] = []
        split = split_parts = 0
        ids, trained, digests = [], [], []
        encoded = self._tokens([row.rendered for row in read])
        for (place, conversation, rendered), (ids_T, trained_T) in zip(read, encoded, strict=True):
            parts, tokens = [rendered], [(ids_T, trained_T)]
            if self.split_length is not None and len(ids_T) - 1 > self.split_length:
                parts, tokens = self._split(conversation)
                split += len(parts) > 1
                split_parts += len(parts) if len(parts) > 1 else 0
            for part, (part_ids_T, part_trained_T) in zip(parts, tokens, strict=True):
                if part_trained_T.any():
                    ids.append(part_ids_T)
                    trained.append(part_trained_T)
                    digests.append(hashlib.blake2b(part.text.encode(), digest_size=DIGEST_BYTES).digest())
                else:
                    untrained.append(f"{place}: no token to train on")
        return Encoded(
            rows=len(chunk.rows),
            size=chunk.size,
            examples=pack_examples(ids, trained, digests, self.dtype),
            broken=broken,
            untrained=untrained,
            split=split,
            split_parts=split_parts,
        )

    def _tokens(self, rendered: Sequence[Rendered]) -> list[Masked]:
        encoded = self.renderer.tokenizer.encode_batch([one.text for one in rendered])
        return [
            (ids_T, token_mask(char_starts_T, one.trained_spans))
            for one, (ids_T, char_starts_T) in zip(rendered, encoded, strict=True)
        ]

    def _split(self, conversation: Conversation) -> tuple[list[Rendered], list[Masked]]:
        assert self.split_length is not None, "asked for by the caller"

        def tokens(part: Conversation) -> int:
            return len(self._tokens([self.renderer.render(part)])[0][0])

        parts = split_conversation(conversation, self.split_length + 1, tokens)
        rendered = [self.renderer.render(part) for part in parts]
        return rendered, self._tokens(rendered)


def split_conversation(
    conversation: Conversation, limit: int, length_of: Callable[[Conversation], int]
) -> list[Conversation]:
    """Cut a conversation at turn borders into parts of at most ``limit``, each as many rounds as fit.

    A round is a user turn with all that follows up to the next one. Each part starts with what comes
    before the first user turn (the system prompt), again. A round that is too long by itself is a part
    of its own, still too long: packing drops and counts it. ``length_of`` grows with every round.
    """
    preamble, rounds = _rounds(conversation)
    if len(rounds) <= 1:
        return [conversation]

    def part(first: int, last: int) -> Conversation:
        turns = tuple(turn for one in rounds[first:last] for turn in one)
        return replace(conversation, turns=preamble + turns)

    parts = []
    first = 0
    while first < len(rounds):
        count = _most_rounds(len(rounds) - first, limit, lambda n, at=first: length_of(part(at, at + n)))  # type: ignore[misc]
        parts.append(part(first, first + count))
        first += count
    return parts


def _most_rounds(available: int, limit: int, length: Callable[[int], int]) -> int:
    """Return the most rounds that are no longer than the limit, one at least."""
    tried = 1
    # doubling first: the length of the whole rest is dear, and mostly far too long
    while tried < available and length(min(2 * tried, available)) <= limit:
        tried = min(2 * tried, available)
    if tried == available:
        return available
    upper = min(2 * tried, available)
    return tried + bisect_right(range(tried + 1, upper), limit, key=length)


def _rounds(conversation: Conversation) -> tuple[tuple[Turn, ...], list[list[Turn]]]:
    preamble: list[Turn] = []
    rounds: list[list[Turn]] = []
    for turn in conversation.turns:
        if turn.role == "user":
            rounds.append([turn])
        elif rounds:
            rounds[-1].append(turn)
        else:
            preamble.append(turn)
    return tuple(preamble), rounds
