"""Plain tables and lists for a terminal or a log: where there are very many rows, the foremost."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned by width: the first to the left, the others to the right."""
    cells = [[*header], *([str(cell) for cell in row] for row in rows)]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell + " " * (width - _width(cell)) if column == 0 else " " * (width - _width(cell)) + cell
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def foremost(sizes: Sequence[float], most: int | None) -> list[int]:
    """Return the places of the `most` largest, in their order; all if that is None. NaN is the smallest."""
    if most is None or len(sizes) <= most:
        return list(range(len(sizes)))
    ranks = [-math.inf if math.isnan(size) else size for size in sizes]
    return sorted(sorted(range(len(sizes)), key=ranks.__getitem__, reverse=True)[:most])


def foremost_rows(
    header: Sequence[str], rows: Sequence[Sequence[object]], sizes: Sequence[float], most: int | None
) -> str:
    """Return a table of the rows with the largest sizes, and a line that says how many are left out."""
    shown = foremost(sizes, most)
    return "\n".join([table(header, [rows[place] for place in shown]), *left_out(len(rows) - len(shown))])


def first_of(lines: Sequence[str], most: int | None) -> list[str]:
    """Return the first lines, and one that says how many are left out."""
    shown = lines[:most]
    return [*shown, *left_out(len(lines) - len(shown))]


def left_out(count: int) -> list[str]:
    """Return a line that says how many rows or lines are not shown, if any."""
    return [f"  ... and {count:,} more (see --log-sources)"] if count else []


def _width(text: str) -> int:
    """Return the columns that a terminal takes: two for East Asian letters, none for marks upon letters."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.category(character) in ("Mn", "Me") for character in text)
