"""What became of the data, as tables: rows read, examples packed, shares given, texts in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config import RunConfig
from megatron_dynmix.data.packed import PackedSource
from megatron_dynmix.data.prepare.notices import HINTS
from megatron_dynmix.data.prepared import SourceReport, file_of, read_digests, shared_texts
from megatron_dynmix.data.sources import SourceFile
from megatron_dynmix.mixing.weights import example_shares
from megatron_dynmix.records.text_table import first_of, foremost, foremost_rows, left_out

if TYPE_CHECKING:  # it brings Megatron-Core and torch
    from megatron_dynmix.data.rows import PackedRows

NOTABLE_DROP = 0.1
"""Share of a source's examples whose loss deserves a line of its own."""


def prepared_table(reports: Sequence[SourceReport], most: int | None = None) -> str:
    """Show what became of each input's examples; the first broken rows by file and line.

    Here and below, of more than `most` sources only the largest are shown.
    """
    header = [
        *("source", "examples", "tokens", "trained", "mean length", "longest"),
        *("broken", "untrained", "duplicates", "split", "held out"),
    ]
    rows = [
        [
            *(report.name, report.examples, report.tokens, report.trained_tokens),
            *(f"{report.mean_length:.1f}", report.max_length, report.broken, report.untrained),
            *(report.duplicates, report.split, report.held_out),
        ]
        for report in reports
    ]
    broken = [f"  broken: {line}" for report in reports for line in report.first_broken]
    notices = [f"  {line}" for report in reports for line in notice_lines(report)]
    shown = foremost_rows(header, rows, [report.tokens for report in reports], most)
    return "\n".join([shown, *first_of(broken, most), *first_of(notices, most)])


def notice_lines(report: SourceReport) -> list[str]:
    """Return a line for each thing that rows of a source, or its folder, have and a user should know of."""
    lines = [
        f"{report.name}: {one.kind}{f' {one.detail}' if one.detail else ''} in "
        f"{one.rows:,} row{'s' if one.rows > 1 else ''} (first: {one.first}): {HINTS[one.kind]}"
        for one in report.notices
    ]
    if report.unread:
        lines.append(f"{report.name}: not read: {', '.join(report.unread)}: no names that rows are read from")
    return lines


def shared_lines(files: Sequence[SourceFile], config: RunConfig) -> list[str]:
    """Return a line for each two inputs with texts in common, from the digests beside their files."""
    digests = [read_digests(file_of(file.prefix(config), "digests")) for file in files]
    lines, pairs = [], shared_texts(digests)
    shown = foremost([pair.texts for pair in pairs], config.logging.most_of(config.data.sources))
    for shared in map(pairs.__getitem__, shown):
        first, second = files[shared.first], files[shared.second]
        texts = "1 text stands" if shared.texts == 1 else f"{shared.texts} texts stand"
        why = "that much of their gate loads is alike for no other reason"
        if first.is_probe != second.is_probe:
            why = "what is trained on is not held out, so its gate loads and losses mislead"
        lines.append(f"WARNING: {texts} in both {first.label} and {second.label}: {why}")
    return [*lines, *left_out(len(pairs) - len(shown))]


def share_table(
    rows: Sequence[PackedRows | PackedSource], row_shares_D: NDArray[np.float64], most: int | None = None
) -> str:
    """Show the sources' weights before a strategy changes them: shares of the rows, and of the examples."""
    per_row_D = np.array([source.mean_examples_per_row for source in rows])
    shares = zip(rows, per_row_D, row_shares_D, example_shares(row_shares_D, per_row_D), strict=True)
    lines = [
        [source.name, f"{per_row:.2f}", f"{of_rows:.4f}", f"{of_examples:.4f}"]
        for source, per_row, of_rows, of_examples in shares
    ]
    header = ["source", "examples a row", "share of rows", "share of examples"]
    return foremost_rows(header, lines, row_shares_D.tolist(), most)


def packed_table(sources: Sequence[PackedRows | PackedSource], most: int | None = None) -> str:
    """Show what became of each source's examples in packing, and a line where many were lost."""
    header = ["source", "rows", "examples", "over-long dropped", "truncated", "untrained", "useful tokens"]
    reports = [(rows.name, rows.packing_report) for rows in sources]
    lines = [
        [
            *(name, report.rows, report.examples, report.dropped_overlong, report.truncated),
            *(report.untrained, f"{report.useful_token_share:.3f}"),
        ]
        for name, report in reports
    ]
    notes = []
    for name, report in reports:
        lost = report.dropped_overlong / (report.examples + report.dropped_overlong + report.untrained)
        if lost > NOTABLE_DROP:
            notes.append(
                f"WARNING: {lost:.0%} of the examples of {name} are longer than seq_length and were dropped; "
                "raise --seq-length, or keep their beginning with --overlong truncate"
            )
    shown = foremost_rows(header, lines, [report.rows for _, report in reports], most)
    return "\n".join([shown, *first_of(notes, most)])
