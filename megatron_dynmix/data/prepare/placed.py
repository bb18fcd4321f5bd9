"""A rendered text, and where the texts of a conversation stand in it."""

from collections.abc import Iterator, Sequence

from megatron_dynmix.data.prepare.traced import Run, Span, Traced, runs_between


class Placed:
    """A text with the runs that are of a turn; ``turn_of`` says of each part whose it is.

    ``marked_spans`` are what is in `{% generation %}`.
    """

    def __init__(self, text: Traced, turn_of: Sequence[int], marked_spans: Sequence[Span]) -> None:
        self.text, self.runs, self.marked_spans = text.plain, list(_first(text.runs)), marked_spans
        self.turns = [turn_of[run.part] for run in self.runs]
        """Of each run."""
        self.parts = frozenset(run.part for run in self.runs)
        """The parts of which there is something."""
        self.runs_of: dict[int, list[int]] = {}
        """The numbers of each turn's runs."""
        for number, turn in enumerate(self.turns):
            self.runs_of.setdefault(turn, []).append(number)

    def behind(self, turn: int | None = None) -> str:
        """Return what stands behind all that a turn says, or behind all that is said."""
        numbers = range(len(self.runs)) if turn is None else self.runs_of.get(turn, [])
        return self.text[self.runs[numbers[-1]].end if numbers else 0 :]

    def runs_in(self, span: Span) -> tuple[int, int]:
        """Return the numbers of the first run that ends behind a start, and the first behind an end."""
        return runs_between(self.runs, *span)

    def around(self, turn: int) -> str:
        """Return what stands between the texts before and behind a turn's."""
        own = self.runs_of.get(turn)
        if own is None:
            return ""
        start = self.runs[own[0] - 1].end if own[0] else 0
        end = self.runs[own[-1] + 1].start if own[-1] + 1 < len(self.runs) else len(self.text)
        return self.text[start:end]

    def says(self, run: Run) -> bool:
        """Tell whether there is more than white space in a run."""
        return not self.text[run.start : run.end].isspace()


def _first(runs: Sequence[Run]) -> Iterator[Run]:
    """Yield the runs but those that say again what is written: some name a call in its result, too."""
    written: dict[int, int] = {}
    for run in runs:
        if run.source_start >= written.get(run.part, 0):
            yield run
            written[run.part] = run.source_end
