"""A conversation as a chat template writes it, with all that was given in it."""

from collections.abc import Mapping
from typing import Any

from megatron_dynmix.data.prepare.conversation import Conversation
from megatron_dynmix.data.prepare.forms import Form, Given, forms
from megatron_dynmix.data.prepare.jinja import ChatTemplate, Refused
from megatron_dynmix.data.prepare.placed import Placed
from megatron_dynmix.data.prepare.traced import MOST_MARKS
from megatron_dynmix.data.prepare.written import Missing, Review, review

_SHOWN = 3


class Page:
    """A (guarded) conversation, written in one form.

    ``names`` is what the template reads beside the conversation. Parts that are ``marked`` are found by marks
    on either side of them: what loses the origin of characters (``%``, `indent`) may leave those in place.
    """

    def __init__(
        self,
        template: ChatTemplate,
        names: Mapping[str, Any],
        conversation: Conversation,
        form: Form,
        marked: frozenset[int] = frozenset(),
    ) -> None:
        self._template, self._names, self.turns = template, names, conversation.turns
        self.given = Given.of(conversation, form, template, marked)

    def is_answer(self, turn: int) -> bool:
        """Tell whether a turn (-1: the tools) is the assistant's."""
        return turn >= 0 and self.turns[turn].role == "assistant"

    def name(self, turn: int) -> str:
        """Return how to call an answer."""
        return f"answer {sum(map(self.is_answer, range(turn + 1)))}"

    def endless(self, turn: int) -> ValueError:
        """Return the error of an answer with no end."""
        return ValueError(
            f"the chat template writes nothing behind {self.name(turn)} that ends it, so no end would be "
            "learnt (what begins a turn is none); use the template vicuna, or let it write eos_token there"
        )

    def write(self) -> Review:
        """Write all of it, and say what is left out; the template may refuse (`Refused`)."""
        self.placed = self.shorter(len(self.turns), is_asked=False)
        return review(self.given, self.placed, self.turns)

    def shorter(self, turns: int, *, is_asked: bool) -> Placed:
        """Write the first so many turns, with or without what asks for an answer."""
        given = self.given
        text, marked_spans = self._template.render(
            given.messages[:turns],
            tools=given.tools,
            names=self._names,
            add_generation_prompt=is_asked,
            marked=[part.text for part in given.parts] if given.marked else (),
        )
        return Placed(text, [part.turn for part in given.parts], marked_spans)


def write(
    template: ChatTemplate, names: Mapping[str, Any], conversation: Conversation
) -> tuple[Page, Review]:
    """Return a conversation, written in the first form of which the template leaves nothing out.

    If there is none it is a ValueError, with the template's own words or with what is left out.
    """
    refused: list[Refused] = []
    lacking: list[list[Missing]] = []
    tried: list[object] = []
    for form in forms(conversation, template):
        page = Page(template, names, conversation, form)
        if page.given.messages in tried:
            continue
        tried.append(page.given.messages)
        try:
            seen = page.write()
        except Refused as error:
            refused.append(error)
            continue
        if lost := seen.parts - page.placed.parts - set(range(MOST_MARKS, len(page.given.parts))):
            page, seen = _by_marks(page, seen, Page(template, names, conversation, form, lost))
        if not seen.missing:
            return page, seen
        lacking.append(seen.missing)
    # what a template leaves out says more than why it does not take another form
    if not lacking:
        raise refused[0]
    # of several parts of one thing the first tells which it is
    shown = {one.name.partition(" (")[0]: one.name for one in reversed(min(lacking, key=len))}
    said = ", ".join(list(shown.values())[::-1][:_SHOWN])
    raise ValueError(f"the chat template leaves out {said}; use one that writes it")


def _by_marks(page: Page, seen: Review, marked: Page) -> tuple[Page, Review]:
    """Return the page where what has lost its origin is found by marks, if these change nothing else."""
    try:
        seen_again = marked.write()
    except Refused:
        return page, seen
    return (marked, seen_again) if marked.placed.text == page.placed.text else (page, seen)
