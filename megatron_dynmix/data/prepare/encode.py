"""Rows of a file -> examples: what one worker of `prepare` does.

Nothing here imports Megatron-Core, so that a worker starts fast and stays small.
Shape legend: N examples of a chunk, T tokens of one example.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.examples import Examples, pack_examples
from megatron_dynmix.data.prepare.formats import Format
from megatron_dynmix.data.prepare.notices import Notice, Noticed, merged, noticed
from megatron_dynmix.data.prepare.readers import RawRow
from megatron_dynmix.data.prepare.rounds import as_generated
from megatron_dynmix.data.prepare.template import Rendered, Renderer, token_mask
from megatron_dynmix.data.prepared import DIGEST_BYTES
from megatron_dynmix.data.tokenizer.borders import encode_answers
from megatron_dynmix.errors import InputError


class RowChunk(NamedTuple):
    """Rows of one file that follow one another, the format of the file, and how many bytes they are."""

    rows: list[RawRow]
    format: Format
    size: int


class Masked(NamedTuple):
    """Tokens, whether each is trained on, and how many answers begin where the text was cut for them."""

    ids_T: NDArray[np.integer]
    trained_T: NDArray[np.bool_]
    cuts: int


@dataclass
class Counts:
    """What became of rows, under the names of `SourceReport`."""

    rows: int = 0
    broken: int = 0
    untrained: int = 0
    split: int = 0
    split_parts: int = 0
    first_broken: tuple[str, ...] = ()
    notices: tuple[Noticed, ...] = ()
    """Of rows that have become examples, or would have if they trained anything."""

    def __add__(self, other: "Counts") -> "Counts":
        total = Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})
        return replace(total, notices=merged(total.notices))


class Encoded(NamedTuple):
    """What became of a chunk's rows, and how many bytes they were; all bad ones are in ``first_broken``."""

    counts: Counts
    examples: Examples
    size: int


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples; a copy of it goes to every worker.

    ``split_length`` is the positions of a row above which conversations are split, None for never.
    """

    renderer: Renderer
    split_length: int | None
    dtype: type[np.integer]

    def __call__(self, chunk: RowChunk) -> Encoded:
        """Encode a chunk of rows; a template that does not fit is an InputError that names the row."""
        broken: list[str] = []
        read: list[tuple[str, Conversation, Rendered]] = []
        for row in chunk.rows:
            try:
                conversation = chunk.format.parse(row.parse())
                texts = list(self._texts(conversation))
            except InputError as error:
                raise InputError(f"{row.place}: {error}") from error
            except ValueError as error:
                broken.append(f"{row.place}: {error}")
            except RecursionError:
                broken.append(f"{row.place}: not usable: nested too deeply")
            else:
                read += [(row.place, part, rendered) for part, rendered in texts]
        return self._encode(chunk, read, broken)

    def _texts(self, conversation: Conversation) -> Iterator[tuple[Conversation, Rendered]]:
        """Yield what a row is trained on as: one text, or one for each round."""
        if self.renderer.train_on == "rounds" and conversation.turns[0].role != "text":
            yield from as_generated(conversation, self.renderer.render)
        else:
            yield conversation, self.renderer.render(conversation)

    def _encode(
        self, chunk: RowChunk, read: list[tuple[str, Conversation, Rendered]], broken: list[str]
    ) -> Encoded:
        counts = Counts(rows=len(chunk.rows))
        untrained: list[str] = []
        ids, trained, digests = [], [], []
        encoded = self._tokens([rendered for _, _, rendered in read])
        for (place, conversation, rendered), masked in zip(read, encoded, strict=True):
            parts, tokens = [rendered], [masked]
            if self.split_length is not None and len(masked.ids_T) - 1 > self.split_length:
                try:
                    parts, tokens = self._split(conversation, self.split_length + 1)
                except InputError:
                    raise
                except ValueError as error:
                    # as the end of a part an answer needs what templates leave out of earlier ones
                    broken.append(f"{place}: split at rounds: {error}")
                    continue
                if len(parts) > 1:
                    counts.split += 1
                    counts.split_parts += len(parts)
            for part, one in zip(parts, tokens, strict=True):
                if one.trained_T.any():
                    ids.append(one.ids_T)
                    trained.append(one.trained_T)
                    digests.append(hashlib.blake2b(part.text.encode(), digest_size=DIGEST_BYTES).digest())
                else:
                    untrained.append(f"{place}: no token to train on")
        counts.broken, counts.untrained = len(broken), len(untrained)
        counts.first_broken = (*broken, *untrained)
        counts.notices = merged(
            one
            for (place, conversation, rendered), masked in zip(read, encoded, strict=True)
            for one in noticed(place, (*conversation.notices, *self._notices(rendered, masked)))
        )
        return Encoded(counts, pack_examples(ids, trained, digests, self.dtype), chunk.size)

    def _notices(self, rendered: Rendered, masked: Masked) -> Iterator[Notice]:
        yield from rendered.notices
        for token in self.renderer.tokenizer.special.literal(rendered.text):
            yield Notice("special token in text", token)
        if masked.cuts:
            yield Notice("straddled border")

    def _tokens(self, rendered: Sequence[Rendered]) -> list[Masked]:
        borders = [[start for start, _ in one.trained_spans] for one in rendered]
        encoded = encode_answers(self.renderer.tokenizer, [one.text for one in rendered], borders)
        return [
            Masked(ids_T, token_mask(char_starts_T, one.trained_spans), cuts)
            for one, (ids_T, char_starts_T, cuts) in zip(rendered, encoded, strict=True)
        ]

    def _split(self, conversation: Conversation, limit: int) -> tuple[list[Rendered], list[Masked]]:
        def tokens(part: Conversation) -> int:
            return len(self._tokens([self.renderer.render(part)])[0].ids_T)

        parts = split_conversation(conversation, limit, tokens)
        if self.renderer.train_on == "rounds":  # earlier rounds have examples of their own
            parts = [part for part in parts if any(turn.is_trained is not False for turn in _answers(part))]
        rendered = [self.renderer.render(part) for part in parts]
        return rendered, self._tokens(rendered)


def _answers(conversation: Conversation) -> Iterator[Turn]:
    return (turn for turn in conversation.turns if turn.role == "assistant")


def split_conversation(
    conversation: Conversation, limit: int, length_of: Callable[[Conversation], int]
) -> list[Conversation]:
    """Cut a conversation at turn borders into parts of at most ``limit``, each as many rounds as fit.

    A round is a user turn with all that follows up to the next one. Each part starts with what comes
    before the first user turn (the system prompt), again. A round that is too long by itself is a part
    of its own, still too long: packing drops and counts it. ``length_of`` grows with every round.
    """
    preamble: list[Turn] = []
    rounds: list[list[Turn]] = []
    for turn in conversation.turns:
        if turn.role == "user":
            rounds.append([])
        (rounds[-1] if rounds else preamble).append(turn)
    if len(rounds) <= 1:
        return [conversation]

    def part(first: int, last: int) -> Conversation:
        return replace(conversation, turns=(*preamble, *chain(*rounds[first:last])))

    parts = []
    first = 0
    while first < len(rounds):
        count = _most_rounds(len(rounds) - first, limit, lambda n, at=first: length_of(part(at, at + n)))  # type: ignore[misc]
        parts.append(part(first, first + count))
        first += count
    return parts


def _most_rounds(available: int, limit: int, length: Callable[[int], int]) -> int:
    """Return the most rounds that are no longer than the limit, one at least."""
    tried, upper = 1, min(2, available)
    # doubling first: the length of the whole rest is dear, and mostly far too long
    while tried < available and length(upper) <= limit:
        tried, upper = upper, min(2 * upper, available)
    return tried + bisect_right(range(tried + 1, upper), limit, key=length)
