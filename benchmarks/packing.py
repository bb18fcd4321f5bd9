"""Packing: how fast, how full, and how much it leaves to chance.

Fast: a million examples, beside first-fit decreasing one example at a time, as other trainers pack. Full: how
much of what the model computes is an example's token, beside two ways of padding. One padded row per example
is what the official implementation of the paper does; padding to the longest of a batch is what most trainers
do. Over-long examples are truncated in all three. Chance: how many pairs of examples that share a row share
one under another seed, too. Without `--data` the sources are the quickstart's generated ones, whose examples
are short.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix import platform
from megatron_dynmix.commands.quickstart import write_sources
from megatron_dynmix.records.text_table import table

platform.start()  # before anything that imports megatron.core

from megatron_dynmix.data.packed import PackedSource  # noqa: E402
from megatron_dynmix.data.packing import Packing, pack  # noqa: E402
from megatron_dynmix.data.prepare.formats import parse_sharegpt  # noqa: E402
from megatron_dynmix.data.prepare.prepare import prepare_source  # noqa: E402
from megatron_dynmix.data.prepare.readers import raw_rows  # noqa: E402
from megatron_dynmix.data.prepare.template import Renderer  # noqa: E402
from megatron_dynmix.data.prepared import Recipe  # noqa: E402
from megatron_dynmix.data.rows import PackedRows  # noqa: E402
from megatron_dynmix.data.tokenizer.base import Tokenizer  # noqa: E402
from megatron_dynmix.data.tokenizer.fast import train_bpe  # noqa: E402

SOURCES = ("chat", "general", "math", "code")
TEMPLATE: Final = "vicuna"
SEED = 1234


def find_sources(data: Path | None, folder: Path) -> dict[str, Path]:
    """Name -> JSONL file: the given folder's, or generated ones."""
    if data is None:
        return {name: files["train"] for name, files in write_sources(folder, SEED).items()}
    return {name: data / name / "train.jsonl" for name in SOURCES}


def train_tokenizer(files: list[Path], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a byte-level BPE on the rendered examples, the template's own words included."""
    bytes_only = train_bpe([], vocab_size, folder / "bytes")
    renderer = Renderer(bytes_only, TEMPLATE)

    def texts() -> Iterator[str]:
        for path in files:
            for row in raw_rows(path):
                try:
                    conversation = parse_sharegpt(row.parse())
                except ValueError:
                    continue  # a broken row is counted when the source is prepared
                # the end token has its id already, no merge shall be spent on its letters
                yield renderer.render(conversation).text.replace(bytes_only.eos, "")

    return train_bpe(texts(), vocab_size, folder / "tokenizer")


def prepared_sources(data: Path | None, vocab_size: int, folder: Path) -> dict[str, Path]:
    """Name -> prefix of a prepared source: those of `data` if it holds such, else made in `folder`."""
    if data is not None and all((data / f"{name}.idx").is_file() for name in SOURCES):
        return {name: data / name for name in SOURCES}
    files = find_sources(data, folder / "sources")
    renderer = Renderer(train_tokenizer(list(files.values()), vocab_size, folder), TEMPLATE)
    recipe = Recipe(tokenizer=renderer.tokenizer.fingerprint, template=renderer.fingerprint)
    for name, path in files.items():
        prefix = folder / "prepared" / name
        prepare_source(name=name, inputs=[path], prefix=prefix, renderer=renderer, recipe=recipe)
    return {name: folder / "prepared" / name for name in files}


def pack_source(name: str, prefix: Path, seq_length: int) -> PackedRows:
    """Pack one source as a run would."""
    source = PackedSource(
        name=name, prefix=prefix, seq_length=seq_length, seed=SEED, overlong="truncate", cache_dir=None
    )
    return PackedRows(source, pad_id=0)


def example_lengths(rows: PackedRows) -> NDArray[np.int64]:
    """Positions of each example, counted in the rows themselves."""
    lengths = [np.bincount(rows[r]["segment_ids"][~rows[r]["padding_mask"]]) for r in range(len(rows))]
    return np.concatenate(lengths)


def first_fit_decreasing(lengths_N: NDArray[np.int64], capacity: int) -> int:
    """Pack one example at a time, the longest first, into the first row with room; returns the rows.

    A tree over the rooms 0..capacity, with the first row of each room at its leaves, finds that row in
    log2(capacity) steps; looking at all rows, as some do, would take hours for a million examples.
    """
    leaves = 1 << capacity.bit_length()
    none = len(lengths_N)
    first = [none] * (2 * leaves)
    rows_of_room: list[list[int]] = [[] for _ in range(leaves)]
    rooms: list[int] = []
    for length in np.sort(lengths_N)[::-1].tolist():
        row, node = none, leaves + length
        last = 2 * leaves - 1
        while node <= last:  # the first row among all rooms >= length
            if node & 1:
                row = min(row, first[node])
                node += 1
            if not last & 1:
                row = min(row, first[last])
                last -= 1
            node, last = node >> 1, last >> 1
        if row == none:
            row, room = len(rooms), capacity
            rooms.append(room)
        else:
            room = rooms[row]
            heapq.heappop(rows_of_room[room])
            _set_first(first, leaves + room, rows_of_room[room][0] if rows_of_room[room] else none)
        rooms[row] = room = room - length
        heapq.heappush(rows_of_room[room], row)
        _set_first(first, leaves + room, rows_of_room[room][0])
    return len(rooms)


def _set_first(first: list[int], node: int, row: int) -> None:
    first[node] = row
    while node := node >> 1:
        first[node] = min(first[2 * node], first[2 * node + 1])


def mates(packing: Packing) -> set[tuple[int, int]]:
    """All pairs of examples that share a row."""
    return {
        pair
        for first, last in pairwise(packing.row_starts_R1)
        for pair in combinations(sorted(packing.order_N[first:last].tolist()), 2)
    }


def kept_mates(lengths_N: NDArray[np.int64], capacity: int) -> float:
    """Share of the pairs that share a row also under another seed."""
    one, other = (mates(pack(lengths_N, capacity, seed)) for seed in (SEED, SEED + 1))
    return len(one & other) / len(one)


def speed(num_examples: int, capacity: int) -> str:
    """Return a line of figures: a million examples of a realistic spread of lengths, packed in two ways."""
    lengths_N = np.random.default_rng(SEED).lognormal(5.0, 0.8, num_examples).astype(np.int64)
    lengths_N = lengths_N.clip(1, capacity)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        ours = pack(lengths_N, capacity, SEED).num_rows
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    theirs = first_fit_decreasing(lengths_N, capacity)
    peer = time.perf_counter() - begin
    tokens = int(lengths_N.sum())
    header = ["", "seconds", "rows", "useful %"]
    rows = [
        [name, f"{duration:.2f}", f"{rows:,}", f"{100 * tokens / (rows * capacity):.2f}"]
        for name, duration, rows in (
            ("histogram best-fit (median of 3)", float(np.median(seconds)), ours),
            ("first-fit decreasing, one by one", peer, theirs),
        )
    ]
    return f"{table(header, rows)}\n{peer / float(np.median(seconds)):.0f} times as fast"


def longest_of_batch_share(lengths_N: NDArray[np.int64], batch_size: int, seed: int) -> float:
    """Return the useful share when shuffled examples are padded to the longest of their batch."""
    shuffled_N = np.random.default_rng(seed).permutation(lengths_N)
    batches = np.split(shuffled_N, np.arange(batch_size, len(shuffled_N), batch_size))
    return int(lengths_N.sum()) / sum(int(batch.max()) * len(batch) for batch in batches)


def shares(
    name: str, lengths: list[NDArray[np.int64]], rows: int, arguments: argparse.Namespace
) -> list[str]:
    """One line of the table, for the examples of one source or of several."""
    size = arguments.seq_length
    lengths_N = np.concatenate(lengths)
    tokens = int(lengths_N.sum())
    best = tokens / size / sum(-(-int(source_N.sum()) // size) for source_N in lengths)
    packed, alone = tokens / (rows * size), tokens / (len(lengths_N) * size)
    batched = [longest_of_batch_share(lengths_N, arguments.batch_size, s) for s in range(arguments.shuffles)]
    longest = float(np.median(batched))
    return [
        name,
        f"{len(lengths_N):,}",
        f"{lengths_N.mean():.0f}",
        f"{rows:,}",
        *(f"{100 * share:.2f}" for share in (packed, best, alone, longest, min(batched), max(batched))),
        f"{packed / best:.4f}",
        f"{packed / alone:.2f}",
        f"{packed / longest:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help=f"folder that holds {{{','.join(SOURCES)}}}/train.jsonl")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=16, help="examples padded to the same length")
    parser.add_argument("--shuffles", type=int, default=11, help="orders of the examples for these batches")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--examples", type=int, default=1_000_000, help="packed to measure the speed")
    arguments = parser.parse_args()
    print(f"{arguments.examples:,} examples into rows of {arguments.seq_length:,} positions:\n")
    print(speed(arguments.examples, arguments.seq_length))
    with tempfile.TemporaryDirectory() as name:
        prefixes = prepared_sources(arguments.data, arguments.vocab_size, Path(name))
        packed = [pack_source(*source, arguments.seq_length) for source in prefixes.items()]
        lengths = [example_lengths(rows) for rows in packed]
    lines = [
        [*shares(rows.name, [lengths_N], len(rows), arguments), f"{kept:.2f}"]
        for rows, lengths_N in zip(packed, lengths, strict=True)
        for kept in [kept_mates(lengths_N, arguments.seq_length)]
    ]
    lines.append([*shares("all", lengths, sum(map(len, packed)), arguments), ""])
    truncated, untrained = (
        sum(getattr(rows.packing_report, what) for rows in packed) for what in ("truncated", "untrained")
    )
    print(
        f"\nUseful-token share in percent at seq_length {arguments.seq_length:,}: "
        f"{'the given' if arguments.data else 'generated'} sources, {truncated} examples truncated,\n"
        f"{untrained} left out, without a token to train on within seq_length.\n"
        "'best': the fewest rows the tokens could fill, no row shared by "
        "sources; 'alone': one padded row per example;\n'longest': padded to the longest of "
        f"{arguments.batch_size} (median, min and max of {arguments.shuffles} shuffles); 'same mates': "
        "share\nof the pairs of examples in a row that share one under another seed, too.\n"
    )
    header = ["source", "examples", "mean length", "rows", "packed", "best", "alone", "longest", "min", "max"]
    print(table([*header, "packed/best", "packed/alone", "packed/longest", "same mates"], lines))


if __name__ == "__main__":
    main()
