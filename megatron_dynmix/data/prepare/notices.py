"""What a user should know of rows that are kept: counted by kind, the first of each named by its place."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

NoticeKind = Literal[
    "unused key",
    "unknown key",
    "unused training flag",
    "bare tool schema",
    "null left out",
    "templated text",
    "special token in text",
    "removed reasoning",
    "unmarked answer",
    "other prompt",
    "unwritten tools",
    "straddled border",
]
HINTS: dict[NoticeKind, str] = {
    "unused key": "what it holds is not trained on; take it out, or put what should be learnt into the turns",
    "unknown key": "nothing reads it; if it is one of ours under another name, say so in `fields`",
    "unused training flag": "only answers can be trained on; `train_on: everything` trains on the whole text",
    "bare tool schema": 'the template is given it as {"type": "function", "function": ...}, as OpenAI has it',
    "null left out": "a column of structs has the keys of all rows; if null was meant, keep JSON in a string",
    "templated text": "it stays letters and no template is written; give its turns as `messages`",
    "special token in text": "in what somebody wrote it is tokenized as letters, and is no special token",
    "removed reasoning": "the template leaves out reasoning of earlier rounds, so it is not trained on",
    "unmarked answer": "the template puts it outside of {% generation %}, so it is not trained on",
    "unwritten tools": "the template has calls but no place for schemas; write them into the system prompt",
    "other prompt": "at inference more stands before the last answer than in the text, such as `<think>`",
    "straddled border": "prompt and answer met inside of a token; they are tokenized apart, as at inference",
}
"""What each kind means for training, and what to do."""
_MOST_DETAILS = 20
OTHERS = "others"


class Notice(NamedTuple):
    """One kind of thing that a row has, and which: the key, the token, the role."""

    kind: NoticeKind
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Noticed:
    """How many rows have one thing, and the place of the first."""

    kind: NoticeKind
    detail: str
    rows: int
    first: str


def noticed(place: str, notices: Iterable[Notice]) -> list[Noticed]:
    """Return what one row has, each thing once."""
    return [Noticed(kind=kind, detail=detail, rows=1, first=place) for kind, detail in dict.fromkeys(notices)]


def merged(parts: Iterable[Noticed]) -> tuple[Noticed, ...]:
    """Add up what was noticed, in order; past a number of details of one kind, the rest are `others`."""
    sums: dict[tuple[NoticeKind, str], Noticed] = {}
    details: Counter[NoticeKind] = Counter()
    for part in parts:
        key = part.kind, part.detail
        if key not in sums and details[part.kind] >= _MOST_DETAILS:
            key = part.kind, OTHERS
        if before := sums.get(key):
            sums[key] = replace(before, rows=before.rows + part.rows)
        else:
            sums[key] = replace(part, detail=key[1])
            details[part.kind] += 1
    return tuple(sums.values())
