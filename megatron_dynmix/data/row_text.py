"""Examples and packed rows as text to look at: what is trained on, what is special, where segments meet.

Nothing in the data can command a terminal: what is not printable is shown by its code. Shape legend: T tokens
of one example, S positions of a row.
"""

import os
import sys
import textwrap
from collections.abc import Sequence
from io import TextIOWrapper
from itertools import groupby
from typing import NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from megatron_dynmix.data.rows import PackedRows, read_example
from megatron_dynmix.data.tokenizer.base import Tokenizer


class Span(NamedTuple):
    """A piece of text and what it is."""

    text: str
    trained: bool = False
    special: bool = False
    """One special token, not a text that looks like it."""
    border: bool = False
    """Not data: a line that says what follows."""


def border(text: str) -> Span:
    """Return a line of its own that says what follows."""
    return Span(f"{printable(text)}\n", border=True)


def printable(text: str) -> str:
    """Escape what is not printable, but for line ends: terminals obey some of it."""
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def example_spans(
    ids_T: NDArray[np.integer], trained_T: NDArray[np.bool_], tokenizer: Tokenizer
) -> list[Span]:
    """Decode an example run by run."""
    ids, specials = [int(token) for token in ids_T], tokenizer.special_ids
    kinds = [(bool(trained), token in specials) for token, trained in zip(ids, trained_T, strict=True)]
    spans, start = [], 0
    for (trained, special), run in groupby(kinds):
        end = start + len(list(run))
        # special tokens one by one, so that each border of a turn is seen
        ends = range(start + 1, end + 1) if special else [end]
        for stop in ends:
            spans.append(Span(printable(_decode(ids, start, stop, tokenizer)), trained, special))
            start = stop
    return spans


def _decode(ids: Sequence[int], start: int, stop: int, tokenizer: Tokenizer) -> str:
    """Decode some tokens; the one before them tells whether their first word has a space in front."""
    if start == 0:
        return tokenizer.decode(ids[:stop])
    before, both = tokenizer.decode(ids[start - 1 : start]), tokenizer.decode(ids[start - 1 : stop])
    # a character may be spread over several tokens, and is then none of theirs alone
    return both[len(before) :] if both.startswith(before) else tokenizer.decode(ids[start:stop])


def example_text(indexed: IndexedDataset, number: int, tokenizer: Tokenizer) -> list[Span]:
    """Return a whole example of a prepared source."""
    ids_T, modes_T = read_example(indexed, number)
    trained_T = modes_T == 1
    trained_T[:1] = False  # the first token is an input only
    head = f"example {number}: {len(ids_T):,} tokens, {int(trained_T.sum()):,} trained"
    return [border(head), *example_spans(ids_T, trained_T, tokenizer), Span("\n")]


def row_text(rows: PackedRows, row: int, tokenizer: Tokenizer) -> list[Span]:
    """Return a packed row as a model is given it: segment by segment, padding as a count."""
    arrays, examples = rows[row], rows.examples_of(row)
    padding = int(arrays["padding_mask"].sum())
    size, trained = len(arrays["tokens"]), int(arrays["loss_mask"].sum())
    many = "example" if len(examples) == 1 else "examples"
    place = f"{len(examples)} {many} in {size - padding:,} of {size:,} positions"
    spans = [border(f"row {row} of source {rows.name}: {place}, {trained:,} trained")]
    for segment, number in enumerate(examples):
        here_S = (arrays["segment_ids"] == segment) & ~arrays["padding_mask"]
        ids_T = np.append(arrays["tokens"][here_S], arrays["labels"][here_S][-1])
        trained_T = np.append(False, arrays["loss_mask"][here_S] > 0)
        whole = len(read_example(rows.dataset, number)[0])
        cut = "" if whole == len(ids_T) else f", cut from {whole:,}"
        head = f"--- example {number}: {len(ids_T):,} tokens{cut}, {int(trained_T.sum()):,} trained"
        spans += [border(head), *example_spans(ids_T, trained_T, tokenizer), Span("\n")]
    return [*spans, border(f"--- {padding:,} positions of padding")]


def plain(spans: Sequence[Span]) -> str:
    """Return a text with marks: ``[[trained]]``, ``{{special token}}``."""
    text = ""
    for trained, group in groupby(spans, key=lambda span: span.trained):
        run = "".join(f"{{{{{span.text}}}}}" if span.special else span.text for span in group)
        text += f"[[{run}]]" if trained else run
    return text


def coloured(spans: Sequence[Span]) -> Text:
    """Return a text in colors, for a terminal: trained green, special tokens inverted, borders cyan."""
    text = Text()
    for span in spans:
        style = "cyan" if span.border else "green" if span.trained else ""
        text.append(span.text, style=f"{style} reverse".strip() if span.special else style)
    return text


def show(spans: Sequence[Span], *, in_colour: bool = True) -> None:
    """Print in colors where that is wanted and a terminal reads it, with marks everywhere else."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks is shown all the same
    console = Console(highlight=False)
    if in_colour and console.is_terminal:
        console.print(coloured(spans), end="", soft_wrap=True)
        return
    try:
        print(plain(spans), end="", flush=True)
    except BrokenPipeError:
        # `| head` has seen enough; what is left must not be flushed into the pipe at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def excerpt(text: str, lines: int, width: int = 110) -> str:
    """Return the first lines of a text, wrapped to a width, and how many more there are."""
    every = [
        piece
        for line in text.rstrip("\n").split("\n")
        for piece in textwrap.wrap(line, width, replace_whitespace=False, drop_whitespace=False) or [""]
    ]
    if (more := len(every) - lines) <= 0:
        return "\n".join(every)
    return "\n".join([*every[:lines], f"... {more:,} more line{'s' if more > 1 else ''}"])
