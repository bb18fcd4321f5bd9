"""What a run trains on, to look at: an example, a packed row, or the global batch of an iteration.

Prepares nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.check.data import check_data
from megatron_dynmix.config.load import load_config
from megatron_dynmix.data.prepared import load_report
from megatron_dynmix.data.row_text import Span, border, example_text, row_text
from megatron_dynmix.data.sources import (
    SourceFile,
    build_rows,
    check_prepared,
    pack_file,
    plan_blend,
    source_files,
)
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.load import load_tokenizer
from megatron_dynmix.errors import InputError
from megatron_dynmix.training.mix import Mix, resolve


def inspect(
    target: Path,
    flags: list[str],
    *,
    tokenizer: Path | None,
    example: str | None,
    row: str | None,
    batch: int | None,
) -> list[Span]:
    """Return what the command line asks of the prefix of a prepared source, a RUN.yaml or a run directory.

    One of the last three is given. `flags` win over the settings of a RUN.yaml; a prefix needs its tokenizer.
    """
    if not target.is_dir() and target.suffix not in (".yaml", ".yml"):
        if example is None or tokenizer is None or flags:
            raise InputError(
                f"{target} is taken for the prefix of a prepared source: give --example N and --tokenizer "
                "DIR with it; rows and batches belong to a RUN.yaml"
            )
        return inspect_prepared(target, _number(example, "--example"), tokenizer)
    if batch is not None and target.is_dir():
        raise InputError(
            f"--batch {batch}: {target} is the directory of a run, whose weights may have changed; give a "
            "RUN.yaml, for the batch that it would have with its first weights"
        )
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
    """Return example `number` (from 0) of a source that was prepared with this tokenizer."""
    tokenizer, report = load_tokenizer(tokenizer_dir), load_report(prefix)
    if report.recipe.tokenizer != tokenizer.fingerprint:
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
    """The sources of a run, prepared with its tokenizer and template."""

    config: RunConfig
    tokenizer: Tokenizer

    @classmethod
    def of(cls, run: Path, flags: list[str]) -> Inspection:
        """Open RUN.yaml, with flags, or a run directory; its sources must be prepared."""
        if run.is_dir():
            if not (run / "config.yaml").is_file():
                raise InputError(
                    f"{run} is no run directory: there is no config.yaml in it; give the --run-dir of a run, "
                    "a RUN.yaml, or the prefix of a prepared source"
                )
            if flags:
                raise InputError(f"{' '.join(flags)}: a run directory has its settings; leave the flags out")
            run = run / "config.yaml"
        config = load_config(run, flags)
        check_data(config)
        data = config.data
        tokenizer = load_tokenizer(data.tokenizer or "", trust_remote_code=data.trust_remote_code)
        for file in source_files(config):
            check_prepared(config, file, tokenizer)
        return cls(config, tokenizer)

    def example(self, name: str, number: int) -> list[Span]:
        """Return example `number` of a source, from 0."""
        return _example(f"source {name}", self._file(name).prefix(self.config), number, self.tokenizer)

    def row(self, name: str, number: int) -> list[Span]:
        """Return packed row `number` of a source, from 0."""
        rows = pack_file(self.config, self._file(name), self.tokenizer)
        _check_number(f"row {number} of source {name}", number, len(rows), "rows")
        return row_text(rows, number, self.tokenizer)

    def batch(self, iteration: int) -> list[Span]:
        """Return the rows of the global batch of an iteration, from 1, in the order of their samples.

        The weights are those at the start, as if they never changed.
        """
        if iteration < 1:
            raise InputError(f"iteration {iteration}: the first one is 1")
        for name in ("train_iters", "global_batch_size"):
            if getattr(self.config.training, name) is None:
                raise InputError(f"--batch needs training.{name}, which is missing; give it, or use --row")
        schedule = BatchSchedule.of(self.config)
        rows = build_rows(self.config, self.tokenizer, probe=False)
        first, last = schedule.samples_after(iteration - 1), schedule.samples_after(iteration)
        mix = Mix.of(self.config, resolve(self.config), rows)
        blend = plan_blend(self.config, rows, mix.first_D)
        blend.advance_to(first)
        names, drawn_D = list(self.config.data.sources), blend.drawn_D(first)
        weights = ", ".join(
            f"{name} {weight:.4f}" for name, weight in zip(names, mix.first_D.tolist(), strict=True)
        )
        said = f"iteration {iteration}: samples {first:,} to {last - 1:,}; shares of rows: {weights}"
        spans = [border(said)]
        for sample, (dataset_id, row, _) in enumerate(blend.draws(first, last), start=first):
            epoch = drawn_D[dataset_id] // len(rows[dataset_id])
            drawn_D[dataset_id] += 1
            spans.append(border(f"\n=== sample {sample:,}: source {names[dataset_id]}, epoch {epoch}"))
            spans += row_text(rows[dataset_id], row, self.tokenizer)
        return spans

    def _file(self, name: str) -> SourceFile:
        """Return the input of a source's training rows."""
        files = {file.name: file for file in source_files(self.config) if not file.is_probe}
        if name not in files:
            raise InputError(f"there is no source {name!r}; there are {', '.join(files)}")
        return files[name]
