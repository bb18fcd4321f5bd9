"""How much of what the model computes is an example's token: packed rows, and two ways of padding.

One padded row per example is what the official implementation of the paper does; padding to the longest
of a batch is what most trainers do. Over-long examples are truncated in all three. Without `--data` the
sources are the quickstart's generated ones, whose examples are short.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix import platform
from megatron_dynmix.monitor.tables import table
from megatron_dynmix.quickstart import write_sources

platform.start()  # before anything that imports megatron.core

from megatron_dynmix.data.conversation import parse_sharegpt  # noqa: E402
from megatron_dynmix.data.jsonl import read_jsonl  # noqa: E402
from megatron_dynmix.data.prepare import prepare_source  # noqa: E402
from megatron_dynmix.data.rows import PackedRows  # noqa: E402
from megatron_dynmix.data.template import render  # noqa: E402
from megatron_dynmix.data.tokenizer import Tokenizer, train_bpe  # noqa: E402

SOURCES = ("chat", "general", "math", "code")
TEMPLATE: Final = "vicuna"
SEED = 1234


def find_sources(data: Path | None, folder: Path) -> dict[str, Path]:
    """Name -> JSONL file: the given folder's, or generated ones."""
    if data is None:
        return {name: files["train"] for name, files in write_sources(folder, SEED).items()}
    return {name: data / name / "train.jsonl" for name in SOURCES}


def train_tokenizer(files: list[Path], vocab_size: int, folder: Path) -> Tokenizer:
    """A byte-level BPE of the rendered examples, the template's own words included."""
    bytes_only = train_bpe([], vocab_size, folder / "bytes")

    def texts() -> Iterator[str]:
        for path in files:
            for _, row in read_jsonl(path):
                try:
                    conversation = parse_sharegpt(row)
                except ValueError:
                    continue  # a broken row is counted when the source is prepared
                # the end token has its id already, no merge shall be spent on its letters
                yield render(conversation, bytes_only, TEMPLATE).text.replace(bytes_only.eos, "")

    return train_bpe(texts(), vocab_size, folder / "tokenizer")


def pack_source(
    name: str, path: Path, tokenizer: Tokenizer, seq_length: int, folder: Path
) -> tuple[PackedRows, int]:
    """Prepare and pack one source, as a run would; returns how many examples cannot be trained on, too."""
    prefix = folder / "prepared" / name
    report = prepare_source(name=name, inputs=[path], prefix=prefix, tokenizer=tokenizer, template=TEMPLATE)
    rows = PackedRows.build(
        name=name,
        prefix=prefix,
        seq_length=seq_length,
        seed=SEED,
        overlong="truncate",
        cache_dir=None,
        pad_id=tokenizer.pad_id,
    )
    return rows, report.broken + report.untrained + rows.packing_report.untrained


def example_lengths(rows: PackedRows) -> NDArray[np.int64]:
    """Positions of each example, counted in the rows themselves."""
    lengths = [np.bincount(rows[r]["segment_ids"][~rows[r]["padding_mask"]]) for r in range(len(rows))]
    return np.concatenate(lengths)


def longest_of_batch_share(lengths_N: NDArray[np.int64], batch_size: int, seed: int) -> float:
    """Useful share when shuffled examples are padded to the longest of their batch."""
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = find_sources(arguments.data, folder / "sources")
        tokenizer = train_tokenizer(list(files.values()), arguments.vocab_size, folder)
        sources = [pack_source(*file, tokenizer, arguments.seq_length, folder) for file in files.items()]
        packed, left_out = zip(*sources, strict=True)
        lengths = [example_lengths(rows) for rows in packed]
    lines = [
        shares(rows.name, [lengths_N], len(rows), arguments)
        for rows, lengths_N in zip(packed, lengths, strict=True)
    ]
    lines.append(shares("all", lengths, sum(map(len, packed)), arguments))
    truncated = sum(rows.packing_report.truncated for rows in packed)
    print(
        f"Useful-token share in percent at seq_length {arguments.seq_length:,}: "
        f"{'the given' if arguments.data else 'generated'} sources, vocabulary {tokenizer.vocab_size:,}, "
        f"{truncated} examples truncated,\n{sum(left_out)} left out: broken, or without a token to train on "
        "within seq_length.\n'best': the fewest rows the tokens could fill, no row shared by "
        "sources; 'alone': one padded row per example;\n'longest': padded to the longest of "
        f"{arguments.batch_size} (median, min and max of {arguments.shuffles} shuffles).\n"
    )
    header = ["source", "examples", "mean length", "rows", "packed", "best", "alone", "longest", "min", "max"]
    print(table([*header, "packed/best", "packed/alone", "packed/longest"], lines))


if __name__ == "__main__":
    main()
