"""Whether all that a row holds stands in the text that a template made of it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_dynmix.data.prepare.conversation import END_THINK, THINK, Turn
from megatron_dynmix.data.prepare.forms import Given, Part
from megatron_dynmix.data.prepare.placed import Placed
from megatron_dynmix.data.prepare.traced import to_json

_SHOWN = 40


class Missing(NamedTuple):
    """A part of a row that is not written, and how to call it."""

    part: int
    name: str


class Review(NamedTuple):
    """What is missing in a text, and the parts with reasoning that is left out before the last answer."""

    missing: list[Missing]
    removed: list[int]
    unwritten_tools: bool = False
    """Whether the template has no place for the schemas of tools, though it writes calls of them."""

    @property
    def parts(self) -> frozenset[int]:
        """The numbers of the parts of which something is not there."""
        return frozenset((*(one.part for one in self.missing), *self.removed))


def review(given: Given, placed: Placed, turns: Sequence[Turn]) -> Review:
    """Compare what was given with the text, but for white space; JSON may be escaped.

    Earlier reasoning may be removed, and is in many templates; that of the last answer must be there. Schemas
    of tools must, unless the template is for calls of tools that the system prompt describes.
    """
    last = max(at for at, turn in enumerate(turns) if turn.role == "assistant")
    has_calls = any(turn.extra.get("tool_calls") for turn in turns)
    seen = Review([], [])
    for number, left_out in enumerate(_left_out(given, placed)):
        part = given.parts[number]
        if left_out and number in placed.parts and part.text.strip() in placed.around(part.turn):
            continue  # cut up, and joined with words of the template that are the same
        thought, said = _divided(part, turns, left_out)
        if thought and part.turn < last:
            seen.removed.append(number)
        if said or (thought and part.turn >= last):
            seen.missing.append(Missing(number, _name(part, turns, said or thought, is_thought=not said)))
    written = {run.part for run in placed.runs}
    for number, digits in given.numbers.items():
        turn = given.parts[number].turn
        text = "" if number in written else placed.around(turn)
        if number not in written and (left := [one for one in digits if one not in text]):
            seen.missing.append(Missing(number, _name(given.parts[number], turns, left[0], is_thought=False)))
    is_schema = {given.parts[one.part].kind == "schema" for one in seen.missing}
    if has_calls and not given.template.reads_tools and is_schema == {True}:
        return Review([], seen.removed, unwritten_tools=True)
    return seen


def _left_out(given: Given, placed: Placed) -> Iterator[list[tuple[int, int]]]:
    """Yield for each part which stretches of it are not in the text."""
    written: list[list[tuple[int, int]]] = [[] for _ in given.parts]
    for run in placed.runs:
        written[run.part].append((run.source_start, run.source_end))
    for number, part in enumerate(given.parts):
        left, at = [], 0
        for start, end in sorted(written[number]):
            if at < start:
                left.append((at, start))
            at = max(at, end)
        if at < len(part.text):
            left.append((at, len(part.text)))
        yield left


def _divided(part: Part, turns: Sequence[Turn], left_out: Sequence[tuple[int, int]]) -> tuple[str, str]:
    """Return what is left out of the reasoning in a part, and of what else it says."""
    if part.kind == "identifier" or not left_out:
        return "", ""
    border = 0
    if part.kind == "reasoning":
        border = len(part.text)
    elif part.kind == "text" and turns[part.turn].role == "assistant":
        border = part.text.rfind(END_THINK) + len(END_THINK) if END_THINK in part.text else 0
    thought = "".join(part.text[start : min(end, border)] for start, end in left_out)
    said = "".join(part.text[max(start, border) : end] for start, end in left_out)
    return thought.replace(THINK, "").replace(END_THINK, "").strip(), said.strip()


def _name(part: Part, turns: Sequence[Turn], left_out: str, *, is_thought: bool) -> str:
    excerpt = to_json(left_out if len(left_out) <= _SHOWN else f"{left_out[:_SHOWN]}...")
    if part.turn < 0:
        return f"the tools ({excerpt})"
    what = {
        "system": "the system prompt",
        "tool": f"the tool's result in turn {part.turn + 1}",
    }.get(turns[part.turn].role, f"the text of turn {part.turn + 1}")
    if is_thought:
        what = f"the reasoning of turn {part.turn + 1}"
    elif part.kind in ("call", "arguments"):
        what = f"the {'name' if part.kind == 'call' else 'arguments'} of a call in turn {part.turn + 1}"
    return f"{what} ({excerpt})"
