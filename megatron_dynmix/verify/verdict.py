"""How far a run is proven, how a proof ends early, and how that is said."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dynmix.records.text_table import table
from megatron_dynmix.verify.replay import SourceTally

TOLERANCE = 1e-12
"""How far recomputed numbers may be off: the same bits on the same machine, a rounding apart on another."""


class NotProven(Exception):
    """Something does not agree; the message says where and what."""


@dataclass
class Verdict:
    """How far a run is proven."""

    samples: int = 0
    """Samples from the first on whose digests agree."""
    iteration: int = 0
    updates: int = 0
    """Weight updates that follow from their loads."""
    failure: str | None = None
    notes: list[str] = field(default_factory=list)
    tallies: list[SourceTally] = field(default_factory=list)
    worst_stray: float = 0.0
    worst_owed: float = 0.0

    @property
    def proven(self) -> bool:
        """Whether nothing was found that does not agree."""
        return self.failure is None


def verdict_text(verdict: Verdict) -> str:
    """Return what was drawn of each source, what a reader must know, and whether the run is proven."""
    lines = []
    if verdict.tallies:
        header = ["source", "rows", "drawn", "epochs", "least often", "most often", "lost", "repeated"]
        rows = [
            [
                *(tally.name, tally.size, tally.drawn, f"{tally.drawn / tally.size:.3f}"),
                *(int(tally.times_R.min()), int(tally.times_R.max()), tally.lost, tally.repeated),
            ]
            for tally in verdict.tallies
        ]
        lines += [table(header, rows), ""]
        lines.append(
            f"furthest from the weights: {verdict.worst_stray:.3f} rows in any chunk; owed at the end: "
            f"{verdict.worst_owed:.3f} rows at most"
        )
    lines += [f"note: {note}" for note in verdict.notes]
    reach = f"samples 0 to {verdict.samples - 1}" if verdict.samples else "no sample"
    if verdict.proven and not verdict.samples:
        lines.append("NOTHING TO PROVE: no samples are on record yet")
    elif verdict.proven:
        lines.append(
            f"PROVEN: {reach} (iteration {verdict.iteration}) were drawn as the stages say, and "
            f"{verdict.updates} weight updates follow from their loads"
        )
    else:
        lines.append(f"NOT PROVEN: {verdict.failure}. What comes before agrees: {reach}")
    return "\n".join(lines)
