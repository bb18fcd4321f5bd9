"""Preparing a source: its rows become Megatron's ``.bin`` and ``.idx``, digests and a report beside them.

One document per conversation, one sequence per run of tokens that are all trained on or all not; the
sequence's mode byte says which (1 = trained). One process reads and writes, others encode; the bytes do
not depend on how many there are.
"""

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron_dynmix.data.index_file import token_dtype
from megatron_dynmix.data.prepare.encode import Counts, Encoder, RowChunk
from megatron_dynmix.data.prepare.examples import Examples, HeldOut
from megatron_dynmix.data.prepare.formats import Format, check_format, find_format
from megatron_dynmix.data.prepare.index_writer import IndexedWriter
from megatron_dynmix.data.prepare.inputs import current_report, read_input, refuse_changed, refuse_overwriting
from megatron_dynmix.data.prepare.progress import ProgressBar
from megatron_dynmix.data.prepare.readers import RawRow, is_compressed, parsed_rows, raw_rows
from megatron_dynmix.data.prepare.template import Renderer
from megatron_dynmix.data.prepare.workers import available_cores, map_in_order
from megatron_dynmix.data.prepared import (
    FORMAT_VERSION,
    WRITTEN,
    InputFile,
    Recipe,
    SourceReport,
    count_duplicates,
    file_of,
    load_report,
    probe_prefix,
    read_digests,
    refuse_broken,
    write_report,
)
from megatron_dynmix.errors import CommandFailed, InputError
from megatron_dynmix.files import FULL, why_not_written
from megatron_dynmix.lease import Lease, as_long_as_it_takes

CHUNK_BYTES = 1 << 18
"""Text that a worker encodes at once, about; the order of examples that are held out follows from it."""
BYTES_PER_WORKER = 1 << 23
"""Input for which another process is worth the seconds that it takes to start."""

_BROKEN_SHOWN = 5
_ROW_BYTES = 1 << 10  # of a row that does not come as text, about
_NO_PLACE = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


def prepare_source(
    *,
    name: str,
    inputs: Sequence[Path],
    prefix: Path,
    renderer: Renderer,
    recipe: Recipe,
    unread: Sequence[str] = (),
    strict: bool = False,
    workers: int | None = None,
) -> SourceReport:
    """Write ``prefix.bin``, ``.idx``, ``.digests`` and, last, ``.json`` (the returned report).

    Nothing is done where that is there already, from the same inputs and settings. Ranks, nodes and
    users may ask at once: one prepares, the others wait and find it. Memory does not grow with the
    input, but for 16 bytes per example. The files appear under their names when complete; without
    ``prefix.json`` a source counts as not prepared.

    ``unread`` is what lies beside the inputs and is none, for the report. ``strict`` refuses the source for
    the first row that cannot be used. By default one worker is started for each core, but few for a small
    input. An input that cannot be read, a template that does not fit, or no example left is an InputError, a
    full disk or a dead worker a CommandFailed.
    """
    if not inputs:
        raise InputError(f"source {name}: no input files given; give one file or more")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; it must be 1 or more")
    check_format(recipe.format, recipe.fields)
    encoder = Encoder(renderer, recipe.split_length, token_dtype(renderer.tokenizer.vocab_size))
    with _writing(name, prefix):
        refuse_overwriting(prefix, inputs)
        # most ranks find what one has prepared, and need not hold the place one after the other
        report = current_report(prefix, inputs, recipe)
        if report is None:
            with _held(prefix) as lease:
                report = current_report(prefix, inputs, recipe)
                if report is None:
                    preparation = _Preparation(name, inputs, prefix, recipe, unread, strict, encoder, lease)
                    report = preparation.run(workers)
    if strict:
        refuse_broken(report.name, report.first_broken)
    return replace(report, unread=tuple(unread))  # other files may have come since it was written


@dataclass
class _Preparation:
    name: str
    inputs: Sequence[Path]
    prefix: Path
    recipe: Recipe
    unread: Sequence[str]
    strict: bool
    encoder: Encoder
    lease: Lease
    counts: Counts = field(default_factory=Counts)

    def run(self, workers: int | None) -> SourceReport:
        files = tuple(read_input(path) for path in self.inputs)
        size = sum(file.size for file in files)
        if workers is None:
            workers = min(available_cores(), 1 + size // BYTES_PER_WORKER)
        sieve = HeldOut(self.recipe.held_out)
        with _draft(self.prefix) as draft:
            writer = self._write(draft, workers, sieve, size)
            refuse_changed(files)
            probe = sieve.all() if self.recipe.held_out else None
            report = self._report(draft, writer, files, name=self.name, held_out=len(probe or ()))
            moves = [(draft, self.prefix)]
            if probe is None:
                _forget_probe(self.prefix)
            else:
                moves.append((probe_prefix(draft), probe_prefix(self.prefix)))
                self._write_probe(probe_prefix(draft), probe, files)
            self.lease.check()
            _move(moves)
        return report

    def _write(self, draft: Path, workers: int, sieve: HeldOut, size: int) -> IndexedWriter:
        """Write the draft, without what the sieve holds out."""
        chunks = map_in_order(
            self.encoder,
            _chunks(self.inputs, self.recipe),
            workers,
            preload="megatron_dynmix.data.prepare.encode",
        )
        with (
            closing(chunks),
            ProgressBar(self.name, None if any(map(is_compressed, self.inputs)) else size) as progress,
            IndexedWriter(draft, self.encoder.dtype) as writer,
        ):
            for encoded in chunks:
                self.counts += encoded.counts
                self.counts.first_broken = self.counts.first_broken[:_BROKEN_SHOWN]
                if self.strict:
                    refuse_broken(self.name, self.counts.first_broken)
                writer.add(sieve.sift(encoded.examples))
                progress.advance(encoded.size, len(encoded.examples))
            self._refuse_too_few(writer.examples, len(sieve))
            writer.finish()
        return writer

    def _write_probe(self, draft: Path, probe: Examples, files: tuple[InputFile, ...]) -> None:
        with IndexedWriter(draft, self.encoder.dtype) as writer:
            writer.add(probe)
            writer.finish()
        self.counts = Counts(rows=len(probe))
        self._report(draft, writer, files, name=f"{self.name} (probe)", probe_of=self.name)

    def _refuse_too_few(self, examples: int, held_out: int) -> None:
        counts = self.counts
        if held_out < self.recipe.held_out or (held_out and not examples):
            raise InputError(
                f"source {self.name}: {self.recipe.held_out} different examples were to be held out for the "
                f"probe, but it has only {held_out} and {examples} more; hold out fewer"
            )
        if not examples:
            first = "; ".join(counts.first_broken) or "it holds no rows"
            raise InputError(f"source {self.name}: none of {counts.rows} rows can be trained on ({first})")

    def _report(
        self,
        draft: Path,
        writer: IndexedWriter,
        files: tuple[InputFile, ...],
        *,
        name: str,
        held_out: int = 0,
        probe_of: str | None = None,
    ) -> SourceReport:
        report = SourceReport(
            name=name,
            **vars(self.counts),
            examples=writer.examples,
            tokens=writer.tokens,
            trained_tokens=writer.trained_tokens,
            max_length=writer.max_length,
            duplicates=count_duplicates(read_digests(file_of(draft, "digests"))),
            held_out=held_out,
            inputs=files,
            unread=tuple(self.unread),
            recipe=self.recipe,
            probe_of=probe_of,
            version=FORMAT_VERSION,
            bin_size=file_of(draft, "bin").stat().st_size,
            idx_size=file_of(draft, "idx").stat().st_size,
        )
        write_report(draft, report)
        return report


def _chunks(inputs: Sequence[Path], recipe: Recipe) -> Iterator[RowChunk]:
    """Yield the rows of all files, in order, in pieces that one worker encodes at once."""
    for path in inputs:
        shape = (
            find_format(parsed_rows(path), recipe.fields, recipe.roles)
            if recipe.format == "auto"
            else Format(name=recipe.format, fields=recipe.fields, roles=recipe.roles)
        )
        rows: list[RawRow] = []
        size = 0
        for row in raw_rows(path):
            rows.append(row)
            size += len(row.content) if isinstance(row.content, bytes) else _ROW_BYTES
            if size >= CHUNK_BYTES:
                yield RowChunk(rows, shape, size)
                rows, size = [], 0
        if rows:
            yield RowChunk(rows, shape, size)


def _held(prefix: Path) -> Lease:
    """Hold the place of a source, once whoever prepares it is done; one rank of a job says that it waits."""
    lock = prefix.with_name(f".{prefix.name}.held")  # files named .lock may be left of what used flock
    lease = Lease(lock, f"the preparation of {prefix.name}", "give another place")
    first = os.environ.get("RANK", "0") == "0"
    say = partial(print, file=sys.stderr, flush=True) if first else lambda _: None
    return lease.take(patience=as_long_as_it_takes, say=say)


@contextmanager
def _draft(prefix: Path) -> Iterator[Path]:
    """Yield a prefix to write to; what is left there at the end, or by a process that was killed, goes."""
    folder = prefix.with_name(f".{prefix.name}.draft")
    shutil.rmtree(folder, ignore_errors=True)  # nobody else writes there: the place is held
    folder.mkdir()
    try:
        yield folder / "source"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _forget_probe(prefix: Path) -> None:
    """Take away what was held out of the source before: it is about to be trained on."""
    try:
        outdated = load_report(probe_prefix(prefix)).probe_of is not None
    except InputError:
        return
    if outdated:
        for suffix in reversed(WRITTEN):
            file_of(probe_prefix(prefix), suffix).unlink()


def _move(moves: Sequence[tuple[Path, Path]]) -> None:
    """Put complete drafts in the place of what was there.

    A report vouches for the other files: away with the old ones first, in with the new ones last.
    """
    for _, prefix in moves:
        file_of(prefix, "json").unlink(missing_ok=True)
    for suffix in WRITTEN:
        for draft, prefix in reversed(moves):
            os.replace(file_of(draft, suffix), file_of(prefix, suffix))


@contextmanager
def _writing(name: str, prefix: Path) -> Iterator[None]:
    """Say in one message that the disk is full or may not be written."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            why = why_not_written(error, prefix)
            raise CommandFailed(
                f"source {name}: no space is left for {prefix} ({why}); what was there is as it was; free "
                "some space, or write elsewhere"
            ) from error
        if isinstance(error, _NO_PLACE) or error.errno in (errno.EROFS, errno.ENAMETOOLONG):
            raise InputError(
                f"source {name}: {prefix} cannot be written ({error.strerror}); give another place"
            ) from error
        raise
