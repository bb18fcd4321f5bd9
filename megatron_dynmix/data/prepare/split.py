"""Cutting a conversation that is longer than a row at its turn borders."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from megatron_dynmix.data.prepare.conversation import Conversation, Turn


def split_conversation(
    conversation: Conversation, limit: int, length_of: Callable[[Conversation], int]
) -> list[Conversation]:
    """Return conversations in order that hold every turn once, each as many rounds as fit.

    A round is a user turn with all that follows up to the next one. Each part starts with what comes
    before the first user turn (the system prompt), again. A round that is too long by itself is a part
    of its own, still too long: packing drops and counts it.

    Args:
        conversation: what is to be cut.
        limit: largest length of a part.
        length_of: the length of a conversation; it grows with every round.

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
