"""Things that happened to a run, for the table and the marks of its page."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dynmix.report.records import number

MARKED = ("resume", "override", "fault", "sources")
"""Kinds that are few and change a run; guardrails act at every update of some runs."""


@dataclass(frozen=True)
class Event:
    """One thing."""

    iteration: int
    kind: str
    text: str


def events_of(
    lifecycle: Sequence[Mapping[str, Any]],
    metrics: Iterable[Mapping[str, Any]],
    stages: Iterable[Mapping[str, Any]],
) -> list[Event]:
    """What the records but those of updates tell.

    Args:
        lifecycle: lines of `events.jsonl`: starts, resumes and ends of the training processes.
        metrics: of log intervals.
        stages: lines of the ledger that begin a stage.

    """
    events = [
        Event(line["iteration"], _kind(str(line.get("event"))), _lifecycle_text(line)) for line in lifecycle
    ]
    for line, after in itertools.pairwise(lifecycle):
        if line.get("event") in ("start", "resume") and after.get("event") in ("start", "resume"):
            text = "the processes before ended without a word: killed, interrupted, or the machine was lost"
            events.append(Event(after["iteration"], "fault", text))
    for record in metrics:
        if (skipped := number(record.get("skipped_iterations"))) > 0:
            text = f"{skipped:.0f} iterations changed nothing: their loss or gradients were not finite"
            events.append(Event(record["iteration"], "fault", text))
    for stage in stages:
        if stage.get("why") == "sources changed":
            changes = stage.get("changes")
            text = "; ".join(map(str, changes)) if isinstance(changes, list) else "sources changed"
            events.append(Event(stage["iteration"], "sources", text))
    return events


def _kind(event: str) -> str:
    return "fault" if event == "failed" else event


def _lifecycle_text(line: Mapping[str, Any]) -> str:
    """Time, what is said of it, and what was found."""
    notes = line.get("notes")
    time = str(line.get("time", "")).replace("T", " ").replace("+00:00", " UTC")
    said = [time, *(map(str, notes) if isinstance(notes, list) else [])]
    return "; ".join(text for text in said if text)
