"""A conversation cut at its rounds, each a user turn with all that follows up to the next one."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from megatron_dynmix.data.prepare.conversation import Conversation
from megatron_dynmix.data.prepare.template import Rendered


def as_generated(
    conversation: Conversation, render: Callable[[Conversation], Rendered]
) -> Iterator[tuple[Conversation, Rendered]]:
    """Yield each round behind those before it, as it stood when its answers were generated.

    An answer whose reasoning goes once the round goes on stands in one that ends there. Without an answer to
    train on it is the conversation as a whole.
    """
    turns, first, is_empty = conversation.turns, 0, True
    for end in (*(at for at, turn in enumerate(turns) if turn.role == "user" and at), len(turns)):
        answers = {at for at in range(first, end) if turns[at].role == "assistant"}
        own = {at for at in answers if turns[at].is_trained is not False}
        first = end
        if not own:
            continue
        whole = _rendered(conversation, end, own, render)
        cut_short = own.intersection(whole[1].removed)
        ends = [(at + 1, {at}) for at in sorted(cut_short)] + [(end, own - cut_short)] * (own > cut_short)
        for stop, trained in ends:
            part, rendered = _rendered(conversation, stop, trained, render) if cut_short else whole
            kept = tuple(notice for notice in rendered.notices if notice.kind != "removed reasoning")
            yield part if is_empty else replace(part, notices=()), replace(rendered, notices=kept)
            is_empty = False
    if is_empty:
        yield conversation, render(conversation)


def _rendered(
    conversation: Conversation, end: int, answers: Collection[int], render: Callable[[Conversation], Rendered]
) -> tuple[Conversation, Rendered]:
    part = _only(conversation, end, answers)
    return part, render(part)


def _only(conversation: Conversation, end: int, answers: Collection[int]) -> Conversation:
    """Return the turns up to an end, with these answers alone to train on."""
    turns = (
        turn if turn.role != "assistant" or at in answers else replace(turn, is_trained=False)
        for at, turn in enumerate(conversation.turns[:end])
    )
    return replace(conversation, turns=tuple(turns))
