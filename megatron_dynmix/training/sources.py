"""From the sources of a configuration to prepared files, packed rows and the blend."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dynmix.config import RunConfig
from megatron_dynmix.data.dynamic_blend import DynamicBlendedDataset
from megatron_dynmix.data.prepare import SourceReport, is_current, load_report, prepare_source
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.tokenizer import Tokenizer
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.weights import normalise_weights


@dataclass(frozen=True)
class SourceFile:
    """One input of a run: a source's training rows or its held-out rows."""

    name: str
    is_probe: bool
    path: Path
    """A JSONL file, or the prefix of a prepared source."""

    @property
    def label(self) -> str:
        """How reports call it."""
        return f"{self.name} (probe)" if self.is_probe else self.name

    def prefix(self, config: RunConfig) -> Path:
        """Where its prepared form is, or will be."""
        if not self.path.is_file():
            return self.path
        return Path(config.data.prepared_dir) / (f"{self.name}.probe" if self.is_probe else self.name)


def source_files(config: RunConfig) -> Iterator[SourceFile]:
    """All inputs of a run, training rows first, in the order of their dataset_id."""
    for name, source in config.data.sources.items():
        yield SourceFile(name, False, Path(source.path))
    for name, source in config.data.sources.items():
        if source.probe is not None:
            yield SourceFile(name, True, Path(source.probe))


def prepare_sources(config: RunConfig, tokenizer: Tokenizer) -> Iterator[SourceReport]:
    """Prepare what is not prepared yet, and yield the report of each input as it is done.

    Ranks and nodes may do so at once: one prepares a source, the others wait for it and find it.

    Raises:
        InputError: an input that cannot be read, or a prepared one made with another tokenizer or template.

    """
    template = config.data.template
    for file in source_files(config):
        prefix = file.prefix(config)
        if file.path.is_file():
            prefix.parent.mkdir(parents=True, exist_ok=True)
            with _locked(prefix):
                if not is_current(prefix, [file.path], tokenizer, template):
                    prepare_source(
                        name=file.label,
                        inputs=[file.path],
                        prefix=prefix,
                        tokenizer=tokenizer,
                        template=template,
                    )
        report = load_report(prefix)
        if (report.tokenizer, report.template) != (tokenizer.fingerprint, template):
            raise InputError(
                f"source {file.label}: {prefix} was prepared with template {report.template} and another "
                f"tokenizer than {config.data.tokenizer}, or another template than {template}; prepare it "
                "again, or give what it was prepared with"
            )
        yield report


@contextmanager
def _locked(prefix: Path) -> Iterator[None]:
    """Hold a source's lock file; also between nodes where the file system locks over the network."""
    with prefix.with_name(f".{prefix.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_rows(config: RunConfig, tokenizer: Tokenizer, *, probe: bool) -> list[PackedRows]:
    """Packed rows of each source's training (or held-out) examples; packings are cached."""
    return [
        PackedRows.build(
            name=file.label,
            prefix=file.prefix(config),
            seq_length=config.data.seq_length,
            seed=config.training.seed,
            overlong=config.data.overlong,
            cache_dir=Path(config.data.prepared_dir) / "packing",
            pad_id=tokenizer.pad_id,
        )
        for file in source_files(config)
        if file.is_probe == probe
    ]


def initial_weights(config: RunConfig) -> np.ndarray:
    """Shares of the sources at the start; uniform if none was given."""
    weights = {
        name: 1.0 if source.weight is None else source.weight for name, source in config.data.sources.items()
    }
    return normalise_weights(weights)


def build_blend(config: RunConfig, rows: list[PackedRows]) -> DynamicBlendedDataset:
    """The blend of a fresh run."""
    assert config.training.global_batch_size is not None, "checked before start"
    return DynamicBlendedDataset(
        rows,
        initial_weights(config),
        seed=config.training.seed,
        chunk_size=config.mixing.interval * config.training.global_batch_size,
    )
