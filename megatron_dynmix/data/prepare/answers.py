"""Where the answers of a rendered conversation stand, by what is known of its characters.

An answer begins behind what a template writes to ask for one, and ends with what it writes to end one. Both
stand between texts of the row, in what the template says itself; what is between two texts is looked up in a
shorter rendering once, and known wherever it stands again. So the time is linear in the turns.
"""

import re
from collections.abc import Sequence

from megatron_dynmix.data.prepare.notices import Notice
from megatron_dynmix.data.prepare.page import Page
from megatron_dynmix.data.prepare.traced import Span
from megatron_dynmix.data.tokenizer.base import Tokenizer

_UNIT = re.compile(r"<[^<>\s]+>|\w+")
"""What is not begun in one place and ended in another: a token of the template, a word."""
_LIKE_SPECIAL = r"<[|｜][^<>\s]+[|｜]>"
"""What is a special token to the author of a template, whatever the tokenizer has."""
Found = tuple[list[Span], list[Notice]]
"""Spans that are wanted, in order, and what a user should know of them."""
_JSON_ENDS = '"}]) \n'


def asked_answers(page: Page, wanted: Sequence[int], tokenizer: Tokenizer) -> Found:
    """Return the spans of the turns that are wanted, where a template does not mark answers.

    An answer whose start or end is not known is a ValueError.
    """
    borders = _Borders(page, tokenizer)
    spans = [borders.span(turn) for turn in wanted]
    return spans, [Notice("other prompt")] if borders.is_asked_otherwise else []


def marked_answers(page: Page, wanted: Sequence[int], tokenizer: Tokenizer) -> Found:
    """Return what is in `{% generation %}` of the turns that are wanted, with an end token right behind.

    A mark around what is no answer, or with nothing that ends the answer, is a ValueError.
    """
    spans_of: dict[int, list[Span]] = {}
    for span in page.placed.marked_spans:
        spans_of.setdefault(_marked_turn(page, span), []).append(span)
    spans = []
    for turn in wanted:
        if found := spans_of.get(turn):
            *whole, last = found
            spans += [*whole, (last[0], _marked_end(page, turn, last, tokenizer.special.texts))]
    has_more = any(turn not in spans_of for turn in wanted)
    return spans, [Notice("unmarked answer")] if has_more else []


def _marked_turn(page: Page, span: Span) -> int:
    """Return whose text is in a mark; of words of the template alone, whose text is behind or before them."""
    placed = page.placed
    first, behind = placed.runs_in(span)
    near = placed.turns[first:behind] or [*placed.turns[first : first + 1], *placed.turns[first - 1 : first]]
    answers = [turn for turn in near if page.is_answer(turn)]
    if not answers or (first < behind and set(near) != {answers[0]}):
        raise ValueError("the chat template has {% generation %} around what is not one answer")
    return answers[0]


def _marked_end(page: Page, turn: int, span: Span, special: tuple[str, ...]) -> int:
    placed, (start, end) = page.placed, span
    if not placed.text[start:end].rstrip().endswith(special):
        if follows := next((name for name in special if placed.text.startswith(name, end)), ""):
            return end + len(follows)
        first, behind = placed.runs_in(span)
        said = placed.runs[behind - 1].end if first < behind else start
        if not placed.text[said:end].strip(_JSON_ENDS):
            raise page.endless(turn)
    return end


class _Borders:
    """What stands before and behind the answers of one text, each different text looked up once."""

    def __init__(self, page: Page, tokenizer: Tokenizer) -> None:
        self._page, self._placed, self._eos = page, page.placed, tokenizer.eos
        longest_first = map(re.escape, sorted(tokenizer.special.texts, key=len, reverse=True))
        self._token = re.compile(f"({'|'.join((*longest_first, _LIKE_SPECIAL))})")
        self._starts: dict[str, tuple[int, bool]] = {}
        self._ends: dict[str, int] = {}
        self.is_asked_otherwise = False
        """Whether the last answer is asked for with more than stands before it."""

    def span(self, turn: int) -> Span:
        """Return where the answer that is this turn stands."""
        placed, own = self._placed, self._placed.runs_of.get(turn, [])
        if not any(placed.says(placed.runs[at]) for at in own):
            raise ValueError(f"{self._page.name(turn)} would train nothing but its end")
        first, last = own[0], own[-1]
        if last - first + 1 != len(own):
            raise ValueError(f"the chat template writes other turns inside of {self._page.name(turn)}")
        before = placed.runs[first - 1].end if first else 0
        behind = placed.runs[last + 1].start if last + 1 < len(placed.runs) else len(placed.text)
        start, end = placed.runs[first].start, placed.runs[last].end
        asked, closed = placed.text[before:start], placed.text[end:behind]
        if asked not in self._starts:
            self._starts[asked] = self._start(asked, turn)
        if closed not in self._ends:
            self._ends[closed] = self._end(closed, turn)
        length, is_all = self._starts[asked]
        if turn == len(self._page.turns) - 1:
            self.is_asked_otherwise = not is_all
        return before + length, end + self._ends[closed]

    def _start(self, asked: str, turn: int) -> tuple[int, bool]:
        """Return how much of what stands before an answer is what asks for it, and whether that is all."""
        prompt = self._page.shorter(turn, is_asked=True).behind()
        least = min(len(asked), len(prompt))
        common = next((at for at in range(least) if asked[at] != prompt[at]), least)
        if common < least:
            closing = self._page.shorter(turn, is_asked=False).behind()
            question = prompt.removeprefix(closing)
            if question and (at := asked.rfind(question)) >= 0:
                return at + len(question), True
            common = self._border(asked, prompt, common)
            if common <= len(closing):
                raise ValueError(
                    f"the chat template asks for {self._page.name(turn)} in another way than it writes it, "
                    "so its start is not known"
                )
        return common, common == len(prompt)

    @staticmethod
    def _border(one: str, other: str, at: int) -> int:
        """Return the last position up to this one that is inside of no token or word of either text."""
        for text in (one, other):
            for token in _UNIT.finditer(text):
                if token.start() < at < token.end():
                    at = token.start()
        return at

    def _end(self, closed: str, turn: int) -> int:
        """Return how much of what stands behind an answer is what ends it."""
        is_last = turn == len(self._page.turns) - 1
        closing = (closed if is_last else self._page.shorter(turn + 1, is_asked=False).behind(turn)).rstrip()
        if not closing.strip(_JSON_ENDS):
            raise self._page.endless(turn)
        # generation stops there, whatever a template writes behind it
        before, eos, _ = closing.partition(self._eos)
        closing = before + eos
        end = len(closing) if closed.startswith(closing) else self._rewritten(closed, closing)
        if not end:
            raise ValueError(
                f"the chat template ends {self._page.name(turn)} differently once later turns follow, so its "
                "end is not known"
            )
        return end

    def _rewritten(self, closed: str, closing: str) -> int:
        """Return where an answer ends that is ended with other words at the end of the text; 0 for unknown.

        It ends where both have the same special token last, or, if there is none, with the first one that
        stands for another.
        """
        at = end = 0
        for here, there in zip(self._token.split(closed), self._token.split(closing), strict=False):
            is_token = self._token.fullmatch(here) is not None
            if here.strip() != there.strip():
                is_other = is_token and self._token.fullmatch(there) is not None and not end
                return at + len(here) if is_other else end
            at += len(here)
            end = at if is_token else end
        return end
