"""The verdict of a conversion as text."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dynmix.convert.verdict import GroupVerdict, Verdict
from megatron_dynmix.records.tables import table

SUM_DIGITS = 16
"""Digits of a checksum that are shown."""
SHOWN = 5


def verdict_text(verdict: Verdict) -> str:
    """The tables, and one line that says whether what was written is what was read."""
    counts = [
        ["read", verdict.read],
        ["written", verdict.written],
        ["unused", 0],  # a conversion that leaves a tensor out, or has none for a place, does not begin
        ["missing", 0],
        ["computed, left out", len(verdict.computed)],
    ]
    if verdict.predicting:
        counts.append(["not converted: multi-token prediction", len(verdict.predicting)])
    lines = [table(["tensors", "count"], counts), "", f"vocabulary padding: {verdict.padding}", ""]
    if verdict.groups is None:
        lines.append("values and logits: not compared (--no-verify)")
    else:
        lines.append(_values_table(verdict.groups))
        differing = [name for group in verdict.groups for name in group.differing]
        if differing:
            more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
            lines += ["", f"values differ in {', '.join(differing[:SHOWN])}{more}"]
        lines += ["", *([verdict.logits.describe()] if verdict.logits is not None else [])]
    if verdict.predicting:
        lines.append(f"not converted: {prediction_text(verdict.predicting)}")
    lines += [f"note: {note}" for note in verdict.notes]
    if not verdict.passed:
        lines.append(f"NOT CONVERTED: the comparison failed; what was written is left in {verdict.folder}")
    elif verdict.groups is None:
        lines.append(f"CONVERTED, NOT VERIFIED: {verdict.folder} ({verdict.dtype})")
    else:
        lines.append(f"CONVERTED: {verdict.folder} ({verdict.dtype}) holds every value that was read")
    return "\n".join(lines)


def prediction_text(names: Sequence[str]) -> str:
    """Which tensors of multi-token prediction stay behind, and what follows."""
    layers = sorted({".".join(name.split(".")[:3]) for name in names})
    return (
        f"{len(names)} tensors of multi-token prediction ({', '.join(f'{layer}.*' for layer in layers)}): "
        "they are not trained, and what is exported is without them"
    )


def _values_table(groups: Sequence[GroupVerdict]) -> str:
    header = ["values of", "tensors", "numbers", "GB", "checksum read", "checksum written", "equal"]
    rows = [
        [
            *(group.group, group.tensors, f"{group.numbers:,}", f"{group.nbytes / 1e9:.3f}"),
            *(group.read_sum[:SUM_DIGITS], group.written_sum[:SUM_DIGITS]),
            "NO" if group.differing else "yes",
        ]
        for group in groups
    ]
    return table(header, rows)
