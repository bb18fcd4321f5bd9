"""What a run trains on, to look at: an example, a packed row, or the global batch of an iteration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.check import check_data
from megatron_dynmix.config.load import load_config
from megatron_dynmix.data.blend import chunks_until, rows_of
from megatron_dynmix.data.prepare.report import SourceReport, load_report
from megatron_dynmix.data.row_text import Span, border, example_text, row_text
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.source_set import Prints, SourceSet, fingerprint
from megatron_dynmix.data.sources import build_blend, build_rows, prepared_sources, source_files
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.load import load_tokenizer
from megatron_dynmix.errors import InputError
from megatron_dynmix.records.jsonl import read_records
from megatron_dynmix.records.ledger import cursor_of, newest_stage
from megatron_dynmix.records.schema import StageLine
from megatron_dynmix.training.mix_setup import first_weights
from megatron_dynmix.training.resume import identity
from megatron_dynmix.verify.records import Record, stage_line


def inspect(
    target: Path,
    flags: list[str],
    *,
    tokenizer: Path | None,
    example: str | None,
    row: str | None,
    batch: int | None,
) -> list[Span]:
    """What the command line asks for.

    Args:
        target: the prefix of a prepared source, a RUN.yaml, or a run directory.
        flags: settings that win over those of a RUN.yaml.
        tokenizer: its folder; has to be given with a prefix.
        example: `N` of a prefix, `SOURCE:N` of a run; exactly one of this and the next two is given.
        row: `SOURCE:N`.
        batch: an iteration.

    Raises:
        InputError: what is wrong with them.

    """
    if not target.is_dir() and target.suffix not in (".yaml", ".yml"):
        if example is None or tokenizer is None or flags:
            raise InputError(
                f"{target} is taken for the prefix of a prepared source: give --example N and --tokenizer "
                "DIR with it; rows and batches belong to a RUN.yaml or a run directory"
            )
        return inspect_prepared(target, _number(example, "--example"), tokenizer)
    run = Inspection.of(target, [*flags, *(["--tokenizer", str(tokenizer)] if tokenizer else [])])
    if batch is not None:
        return run.batch(batch)
    if example is not None:
        return run.example(*_source_and_number(example, "--example"))
    assert row is not None, "one of the three is given"
    return run.row(*_source_and_number(row, "--row"))


def _source_and_number(text: str, flag: str) -> tuple[str, int]:
    name, colon, number = text.rpartition(":")
    if not colon:
        raise InputError(f"{flag} is {text!r}; of a run it must be SOURCE:N")
    return name, _number(number, flag)


def _number(text: str, flag: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"{flag} has {text!r} for a number; it must be a whole number, 0 or more")
    return int(text)


def inspect_prepared(prefix: Path, number: int, tokenizer_dir: Path) -> list[Span]:
    """Example `number` (from 0) of a prepared source.

    Raises:
        InputError: not a prepared source, another tokenizer than it was prepared with, or no such example.

    """
    tokenizer, report = load_tokenizer(tokenizer_dir), load_report(prefix)
    if report.tokenizer != tokenizer.fingerprint:
        raise InputError(
            f"{prefix} was prepared with another tokenizer than {tokenizer_dir}, which would show other "
            "text; give the one it was prepared with"
        )
    return _example(str(prefix), prefix, number, tokenizer)


def _example(what: str, prefix: Path, number: int, tokenizer: Tokenizer) -> list[Span]:
    indexed = IndexedDataset(str(prefix), multimodal=True)
    _check_number(f"example {number} of {what}", number, len(indexed.document_indices) - 1, "examples")
    return example_text(indexed, number, tokenizer)


def _check_number(what: str, number: int, count: int, things: str) -> None:
    if not 0 <= number < count:
        raise InputError(f"there is no {what}: it has {count:,} {things}; give 0 to {count - 1}")


@dataclass(frozen=True)
class Inspection:
    """The sources of a run that is to begin (RUN.yaml) or has begun (its directory). Prepares nothing."""

    config: RunConfig
    tokenizer: Tokenizer
    reports: list[SourceReport]
    ledger: list[Record] | None
    """Of a run that has begun."""

    @classmethod
    def of(cls, run: Path, flags: list[str]) -> Inspection:
        """Open RUN.yaml, with flags, or a run directory.

        Raises:
            InputError: it is neither, or its sources are not prepared with its tokenizer and template.

        """
        ledger: list[Record] | None = None
        if run.is_dir():
            if not (run / "config.yaml").is_file() or not (run / "ledger.jsonl").is_file():
                raise InputError(
                    f"{run} is no run directory: it needs config.yaml and ledger.jsonl; give the --run-dir "
                    "of a run, a RUN.yaml, or the prefix of a prepared source"
                )
            if flags:
                raise InputError(f"{' '.join(flags)}: a run directory has its settings; leave the flags out")
            ledger = [*read_records(run / "ledger.jsonl")]
        config = load_config(run if ledger is None else run / "config.yaml", flags)
        check_data(config)
        data = config.data
        tokenizer = load_tokenizer(data.tokenizer or "", trust_remote_code=data.trust_remote_code)
        return cls(config, tokenizer, list(prepared_sources(config, tokenizer)), ledger)

    def example(self, name: str, number: int) -> list[Span]:
        """Example `number` of a source, from 0.

        Raises:
            InputError: no such source or example.

        """
        self._source_index(name)
        prefix = next(file.prefix(self.config) for file in source_files(self.config) if file.name == name)
        return _example(f"source {name}", prefix, number, self.tokenizer)

    def row(self, name: str, number: int) -> list[Span]:
        """Packed row `number` of a source, from 0.

        Raises:
            InputError: no such source or row.

        """
        rows = self._rows()[self._source_index(name)]
        _check_number(f"row {number} of source {name}", number, len(rows), "rows")
        return row_text(rows, number, self.tokenizer)

    def batch(self, iteration: int) -> list[Span]:
        """The rows of the global batch of an iteration, from 1, in the order of their samples.

        Of a run that has begun the recorded stages say which; of others the weights at the start, as if they
        never changed.

        Raises:
            InputError: no such iteration, or the sources are not what they were then.

        """
        assert self.config.training.global_batch_size is not None, "checked with the configuration"
        if iteration < 1:
            raise InputError(f"iteration {iteration}: the first one is 1")
        schedule = BatchSchedule.of(self.config.training)
        rows = self._rows()
        if self.ledger is None:
            first = schedule.samples_after(iteration - 1)
            last, stage = schedule.samples_after(iteration), self._first_stage(rows)
        else:
            first, last = _recorded_samples(self.ledger, schedule, iteration)
            stage = self._recorded_stage(self.ledger, first, iteration)
        weights = ", ".join(
            f"{name} {weight:.4f}" for name, weight in zip(stage.sources, stage.weights, strict=True)
        )
        spans = [
            border(f"iteration {iteration}: samples {first:,} to {last - 1:,}; shares of rows: {weights}")
        ]
        for sample, (dataset_id, row, epoch) in enumerate(_draws(stage, first, last), start=first):
            name = stage.sources[dataset_id]
            there = rows[list(self.config.data.sources).index(name)]
            spans.append(border(f"\n=== sample {sample:,}: source {name}, epoch {epoch}"))
            spans += row_text(there, row, self.tokenizer)
        return spans

    def _rows(self) -> list[PackedRows]:
        return build_rows(self.config, self.tokenizer, probe=False)

    def _source_index(self, name: str) -> int:
        names = list(self.config.data.sources)
        if name not in names:
            raise InputError(f"there is no source {name!r}; there are {', '.join(names)}")
        return names.index(name)

    def _prints(self) -> Prints:
        """Return what the sources hold now."""
        return identity(self.config, self.reports).fingerprints

    def _first_stage(self, rows: list[PackedRows]) -> StageLine:
        blend = build_blend(self.config, rows, first_weights(self.config, rows))
        sources = SourceSet.of(self._prints(), blend.state)
        return newest_stage(blend, sources, self.config.mixing, {}, why="start", iteration=0)

    def _recorded_stage(self, ledger: list[Record], sample: int, iteration: int) -> StageLine:
        """The stage that a sample was drawn in, if its sources still are what they were."""
        lines = [
            stage_line(record, f"ledger.jsonl:{number}")
            for number, record in enumerate(ledger, start=1)
            if record.get("kind") == "stage"
        ]
        stage = [line for line in lines if line.start_sample <= sample][-1]
        now = {name: fingerprint(parts) for name, parts in self._prints().items()}
        then = dict(zip(stage.sources, stage.fingerprints, strict=True))
        changed = [name for name, content in then.items() if now.get(name) != content]
        if changed:
            raise InputError(
                f"{', '.join(changed)} held other data when iteration {iteration} was trained; its rows can "
                "only be shown with the sources it was trained on"
            )
        return stage


def _draws(stage: StageLine, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """(dataset_id, row, epoch) of the global samples first <= i < last, all in one stage."""
    sizes_D, shuffle_ids_D = np.array(stage.sizes), np.array(stage.shuffle_ids)
    for chunk in chunks_until(cursor_of(stage), np.array(stage.weights), stage.chunk_size, last):
        here = slice(max(first - chunk.start.sample, 0), max(last - chunk.start.sample, 0))
        ids_N, ordinal_N = chunk.dataset_index_N[here], chunk.ordinal_N[here]
        row_N = rows_of(ids_N, ordinal_N, sizes_D, shuffle_ids_D, stage.seed)
        yield from zip(ids_N.tolist(), row_N.tolist(), (ordinal_N // sizes_D[ids_N]).tolist(), strict=True)


def _recorded_samples(ledger: list[Record], schedule: BatchSchedule, iteration: int) -> tuple[int, int]:
    """First sample of an iteration, and of the next: from the ledger's lines around it."""
    known = {0: 0} | {
        record["iteration"]: record["consumed_samples"]
        for record in ledger
        if record.get("kind") == "samples"
    }
    if iteration > max(known):
        raise InputError(
            f"iteration {iteration} is not on record: the run has come to {max(known)} in ledger.jsonl; give "
            f"1 to {max(known)}"
        )
    before = max(there for there in known if there < iteration)
    after = min(there for there in known if there >= iteration)
    if schedule.samples_after(after - before, known[before]) != known[after]:
        raise InputError(
            f"the batch size was changed between iterations {before} and {after}, so it is not known which "
            f"samples iteration {iteration} had; look at another iteration"
        )
    first = schedule.samples_after(iteration - 1 - before, known[before])
    return first, schedule.samples_after(1, first)
