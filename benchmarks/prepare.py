"""How fast `prepare` is, beside the least that it could take: the tokenizer alone over the same strings.

The source is generated: conversations of one to four rounds, of words as frequent as in English (Zipf).
One worker may use one core, and the tokenizer one thread. The floor reads, parses and renders before its
clock starts, and keeps nothing of what it encodes. It is done with a template that is built in and with one
that is not and marks no answers. At last one row has more and more turns, which must take time in proportion.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import psutil
from tokenizers import Tokenizer as BackendTokenizer

from megatron_dynmix.records.text_table import table

if TYPE_CHECKING:  # every worker imports this file again: what is heavy is imported where it is used
    from megatron_dynmix.data.prepare.template import Renderer

MEGABYTE: Final = 1_000_000
FOREIGN: Final = """{%- for message in messages %}
{{- '<' + message.role + '>\\n' + message.content | trim }}
{{- '</s>\\n' if message.role == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>\\n' }}{%- endif %}"""
"""No `{% generation %}`, and no token but the end of an answer."""
TURNS: Final = (200, 2000)
FLOOR_BATCH: Final = 256
VOCABULARY: Final = 20_000
BPE_SIZE: Final = 8192
TOKENIZER_ROWS: Final = 3000
SECONDS_BETWEEN_LOOKS: Final = 0.5


class Measured(NamedTuple):
    """One pass over the source; `cpu` are the seconds of this process alone."""

    seconds: float
    cpu: float
    tokens: int
    grown_mb: float
    worker_mb: float


def words_of(rng: np.random.Generator) -> list[str]:
    """Make up a language: frequent words are short, as in real ones."""
    syllables = [first + then for first in "bcdfghklmnprstvwz" for then in "aeiou"]
    lengths = 1 + (np.log2(1 + np.arange(VOCABULARY)) / 4).astype(int) + rng.integers(0, 2, VOCABULARY)
    drawn = iter(rng.integers(0, len(syllables), int(lengths.sum())).tolist())
    return ["".join(syllables[next(drawn)] for _ in range(length)) for length in lengths.tolist()]


def write_source(path: Path, megabytes: float, seed: int) -> None:
    """Conversations of some 1,000 characters on average, until the file has its size."""
    rng = np.random.default_rng(seed)
    words = np.array(words_of(rng))
    share = 1 / np.arange(10, VOCABULARY + 10)
    share /= share.sum()
    with path.open("w", encoding="utf-8") as file:
        size = 0
        while size < megabytes * MEGABYTE:
            drawn = iter(rng.choice(words, size=100_000, p=share).tolist())
            size += sum(file.write(line) for line in _rows(drawn, rng))


def _rows(words: Iterator[str], rng: np.random.Generator) -> Iterator[str]:
    while True:
        turns = []
        for _ in range(int(rng.integers(1, 5))):
            for speaker, mean in (("human", 20), ("gpt", 60)):
                said = [word for word, _ in zip(words, range(1 + int(rng.exponential(mean))), strict=False)]
                turns.append({"from": speaker, "value": " ".join(said) + "."})
        if any(turn["value"] == "." for turn in turns):
            return  # the words have run out
        yield json.dumps({"conversations": turns}) + "\n"


def texts_of(path: Path) -> Iterator[str]:
    """Return what is said in the first rows: enough to train a tokenizer on."""
    with path.open(encoding="utf-8") as file:
        for _, line in zip(range(TOKENIZER_ROWS), file, strict=False):
            yield from (turn["value"] for turn in json.loads(line)["conversations"])


@contextmanager
def peak_memory() -> Iterator[dict[int, float]]:
    """Largest resident size in MB of this process and of each of its descendants, as far as it was seen."""
    peaks: dict[int, float] = {}
    done = threading.Event()

    def look() -> None:
        here = psutil.Process()
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            for process in (here, *here.children(recursive=True)):
                try:
                    size = process.memory_info().rss / MEGABYTE
                except psutil.NoSuchProcess:
                    continue
                peaks[process.pid] = max(size, peaks.get(process.pid, 0.0))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def floor(path: Path, tokenizer_dir: Path, renderer: Renderer) -> Measured:
    """Time the tokenizer alone, one thread; only its own time is counted."""
    from megatron_dynmix.data.prepare.formats import Format
    from megatron_dynmix.data.prepare.readers import raw_rows
    from megatron_dynmix.data.prepare.workers import one_tokenizer_thread

    backend = BackendTokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    sharegpt = Format(name="sharegpt")
    seconds, cpu, tokens, texts = 0.0, 0.0, 0, []

    def encode() -> None:
        nonlocal seconds, cpu, tokens
        start, start_cpu = time.perf_counter(), time.process_time()
        tokens += sum(len(one.ids) for one in backend.encode_batch(texts, add_special_tokens=False))
        seconds += time.perf_counter() - start
        cpu += time.process_time() - start_cpu
        texts.clear()

    with one_tokenizer_thread():
        for row in raw_rows(path):
            texts.append(renderer.render(sharegpt.parse(row.parse())).text)
            if len(texts) == FLOOR_BATCH:
                encode()
        encode()
    return Measured(seconds, cpu, tokens, 0.0, 0.0)


def prepared(path: Path, folder: Path, renderer: Renderer, workers: int) -> Measured:
    """`prepare` as it is."""
    from megatron_dynmix.data.prepare.prepare import prepare_source
    from megatron_dynmix.data.prepared import Recipe

    prefix = folder / f"prepared-{workers}"
    before = psutil.Process().memory_info().rss / MEGABYTE
    with peak_memory() as peaks:
        start, start_cpu = time.perf_counter(), time.process_time()
        report = prepare_source(
            name="bench",
            inputs=[path],
            prefix=prefix,
            renderer=renderer,
            recipe=Recipe(tokenizer=renderer.tokenizer.fingerprint, template=renderer.fingerprint),
            workers=workers,
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    for written in folder.glob(f"{prefix.name}.*"):
        written.unlink()
    others = [peak for pid, peak in peaks.items() if pid != os.getpid()]
    return Measured(
        seconds,
        cpu,
        report.tokens,
        max(peaks.get(os.getpid(), before) - before, 0.0),
        max(others, default=0.0),
    )


def long_rows(renderer: Renderer, repeats: int) -> str:
    """Time one row of many turns, alone."""
    from megatron_dynmix.data.prepare.encode import Encoder, RowChunk
    from megatron_dynmix.data.prepare.formats import Format
    from megatron_dynmix.data.prepare.readers import RawRow

    encoder, lines = Encoder(renderer, None, np.dtype(np.uint16).type), []
    for turns in TURNS:
        messages = [
            {"role": ("user", "assistant")[at % 2], "content": f"the words of turn {at} are few"}
            for at in range(turns)
        ]
        row = RawRow("long:1", json.dumps({"messages": messages}).encode())
        seconds = []
        for _ in range(repeats + 1):  # the first renders what is remembered
            start = time.process_time()
            encoded = encoder(RowChunk([row], Format(name="messages"), 1))
            seconds.append(time.process_time() - start)
        assert len(encoded.examples) == 1, encoded.counts.first_broken
        best = min(seconds)
        lines.append([f"{turns:,}", f"{best:.3f}", f"{1e6 * best / turns:.0f}"])
    return table(["turns of one row", "CPU s", "microseconds a turn"], lines)


def main() -> None:
    """Print a table: the floor, then each number of workers."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.data.prepare.template import Renderer
    from megatron_dynmix.data.tokenizer.fast import train_bpe
    from megatron_dynmix.data.tokenizer.load import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts")
    parser.add_argument("--tokenizer", type=Path, help="a folder; a BPE of 8,192 tokens if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "source.jsonl"
        write_source(path, arguments.megabytes, seed=1)
        tokenizer_dir = arguments.tokenizer or folder / "tokenizer"
        if arguments.tokenizer is None:
            train_bpe(texts_of(path), BPE_SIZE, tokenizer_dir)
        foreign = folder / "foreign.jinja"
        foreign.write_text(FOREIGN)
        small = folder / "small.jsonl"
        write_source(small, 0.1, seed=2)
        tokenizer = load_tokenizer(tokenizer_dir)
        for template in ("vicuna", str(foreign)):
            renderer = Renderer(tokenizer, template)
            for workers in arguments.workers:  # the server that starts workers takes some seconds, once
                prepared(small, folder, renderer, workers)
            best: dict[str, Measured] = {}
            for _ in range(arguments.repeats):
                runs = {"tokenizer alone": floor(path, tokenizer_dir, renderer)}
                for workers in arguments.workers:
                    label = f"prepare, {workers} worker{'s' * (workers > 1)}"
                    runs[label] = prepared(path, folder, renderer, workers)
                best = {label: min(run, best.get(label, run)) for label, run in runs.items()}
            print(f"\ntemplate {Path(template).name}")
            print_table(best, path.stat().st_size / MEGABYTE)
        print(f"\n{long_rows(renderer, arguments.repeats)}")


def print_table(best: dict[str, Measured], megabytes: float) -> None:
    """One line for each measurement; on a busy machine the CPU seconds say more than the others."""
    alone = best["tokenizer alone"]
    print(f"{megabytes:.0f} MB of JSON Lines, {alone.tokens:,} tokens; CPU seconds are of this process")
    header = [
        "",
        "seconds",
        "MB/s",
        "tokens/s",
        "of the floor",
        "CPU s",
        "grown by, MB",
        "largest worker, MB",
    ]
    lines = [
        [
            *(label, f"{run.seconds:.2f}", f"{megabytes / run.seconds:.2f}"),
            *(f"{run.tokens / run.seconds:,.0f}", f"{alone.seconds / run.seconds:.2f}"),
            *(f"{run.cpu:.2f}", f"{run.grown_mb:.0f}", f"{run.worker_mb:.0f}"),
        ]
        for label, run in best.items()
    ]
    print(table(header, lines))
    if one := best.get("prepare, 1 worker"):
        print(f"\none worker, in CPU seconds: {alone.cpu / one.cpu:.2f} of the floor")


if __name__ == "__main__":
    main()
