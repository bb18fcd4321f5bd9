"""Texts with answers in them: what a model writes is made of the tokens that it would write.

A text is tokenized as a whole, as a conversation is when it is a prompt. But at inference an answer comes
after a prompt that was tokenized when nothing followed, and the two may meet inside of a token of the whole
(a prompt that ends in a line end, an answer that begins with one). The tokens of the prompt alone decide:
what it has no token for is the answer's, and where its tokens are others the text is cut in two.

Shape legend: T tokens of one text or part of it, V ids of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.data.tokenizer.base import Encoding, Tokenizer

_NEAR = 8
"""Characters in front of an answer that are looked at first; nearly always they show that all is well."""


class Answered(NamedTuple):
    """Tokens of a text, none of which stands on both sides of where an answer begins."""

    ids_T: NDArray[np.int64]
    char_starts_T: NDArray[np.int64]
    cuts: int = 0
    """Answers in front of which, or from which on, the tokens are not those of the whole text."""


class _Prompt(NamedTuple):
    """The end of a prompt: its characters, whether it goes on from other text, its tokens in the whole."""

    text: str
    inside: bool
    ids: tuple[int, ...]


def encode_answers(
    tokenizer: Tokenizer, texts: Sequence[str], borders: Sequence[Sequence[int]]
) -> list[Answered]:
    """Encode guarded texts, each with the positions, in order, where a model begins to write."""
    is_special_V = np.zeros(tokenizer.vocab_size, dtype=bool)
    is_special_V[list(tokenizer.special_ids - {tokenizer.unk_id})] = True
    encodings = tokenizer.encode_batch(texts)
    prompts = [
        list(_prompts(text, encoding, positions, is_special_V))
        for text, encoding, positions in zip(texts, encodings, borders, strict=True)
    ]
    # a handful of different ones, as a rule: they are what a template writes
    distinct = {prompt for some in prompts for prompt in some}
    good: set[_Prompt] = set()
    for inside in (False, True):
        some = [prompt for prompt in distinct if prompt.inside == inside]
        alone = tokenizer.encode_batch([prompt.text for prompt in some], inside=inside)
        good |= {one for one, (ids_T, _) in zip(some, alone, strict=True) if tuple(ids_T.tolist()) == one.ids}
    return [
        Answered(*encoding)
        if good.issuperset(some)
        else _apart(text, encoding, positions, tokenizer, is_special_V)
        for text, encoding, positions, some in zip(texts, encodings, borders, prompts, strict=True)
    ]


def _prompts(
    text: str, encoding: Encoding, borders: Sequence[int], is_special_V: NDArray[np.bool_]
) -> Iterator[_Prompt]:
    """Yield for each border what is near in front of it, back to a special token at most."""
    ids_T, starts_T = encoding
    for border, end in zip(borders, np.searchsorted(starts_T, borders).tolist(), strict=True):
        first = end
        while first > 0:
            first -= 1
            is_first_of_character = first == 0 or starts_T[first - 1] < starts_T[first]
            if is_special_V[ids_T[first]] or (starts_T[first] <= border - _NEAR and is_first_of_character):
                break
        inside = first > 0 and not is_special_V[ids_T[first]]
        begin = int(starts_T[first]) if first > 0 else 0
        yield _Prompt(text[begin:border], inside, tuple(ids_T[first:end].tolist()))


def _apart(
    text: str,
    encoding: Encoding,
    borders: Sequence[int],
    tokenizer: Tokenizer,
    is_special_V: NDArray[np.bool_],
) -> Answered:
    """Cut a text where that is needed; nothing changes beyond the special tokens around a border."""
    ids_T, starts_T = encoding
    special_T = np.flatnonzero(is_special_V[ids_T])
    ends_T = [*starts_T[1:].tolist(), len(text)]
    parts, done = [], 0

    def specials_before(border: int) -> int:
        return int(np.searchsorted(special_T, np.searchsorted(starts_T, border)))

    for number, group in groupby(borders, key=specials_before):
        first = int(special_T[number - 1]) if number else 0
        behind = int(special_T[number]) + 1 if number < len(special_T) else len(ids_T)
        begin = int(starts_T[first]) if first else 0
        piece = Answered(ids_T[first:behind], starts_T[first:behind] - begin)
        part = _cut(text[begin : ends_T[behind - 1]], piece, [border - begin for border in group], tokenizer)
        moved = Answered(part.ids_T, part.char_starts_T + begin, part.cuts)
        parts += [Answered(ids_T[done:first], starts_T[done:first]), moved]
        done = behind
    parts.append(Answered(ids_T[done:], starts_T[done:]))
    ids, starts, cuts = zip(*parts, strict=True)
    return Answered(np.concatenate(ids), np.concatenate(starts), sum(cuts))


def _cut(text: str, whole: Answered, borders: Sequence[int], tokenizer: Tokenizer) -> Answered:
    """Cut a text that is a prompt from its beginning on, and whose tokens as a whole are given."""
    ids_T, starts_T, cuts = whole
    first = begin = 0  # token and character from which on the next border is looked at
    for border in borders:
        ((prompt_T, prompt_starts_T),) = tokenizer.encode_batch([text[begin:border]], inside=cuts > 0)
        own, end = first + len(prompt_T), int(np.searchsorted(starts_T, border))
        if own <= end and np.array_equal(ids_T[first:own], prompt_T):
            starts_T = np.concatenate([starts_T[:own], np.full(end - own, border), starts_T[end:]])
            continue
        ((answer_T, answer_starts_T),) = tokenizer.encode_batch([text[border:]], inside=True)
        ids_T = np.concatenate([ids_T[:first], prompt_T, answer_T])
        starts_T = np.concatenate([starts_T[:first], begin + prompt_starts_T, border + answer_starts_T])
        first, begin, cuts = own, border, cuts + 1
    return Answered(ids_T, starts_T, cuts)
