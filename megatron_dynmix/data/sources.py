"""From the sources of a configuration to prepared files, packed rows and the blend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.run_config import DataConfig
from megatron_dynmix.data.blend import order_seed
from megatron_dynmix.data.packed import PackedSource
from megatron_dynmix.data.prepare.template import Renderer
from megatron_dynmix.data.prepared import Recipe, SourceReport, load_report, probe_prefix, refuse_broken
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.errors import InputError

if TYPE_CHECKING:  # what reads rows brings Megatron-Core and torch, and preparing needs neither
    from megatron_dynmix.data.blend_plan import BlendPlan
    from megatron_dynmix.data.rows import PackedRows


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    tokenizer: Tokenizer
    reports: list[SourceReport]
    """What became of each input's examples when it was prepared: the sources', then their probes'."""
    train: list[PackedRows]
    probe: list[PackedRows]
    """Held-out rows; empty in a run that measures none."""


@dataclass(frozen=True)
class SourceFile:
    """One input of a run: a source's training rows or its held-out rows."""

    name: str
    is_probe: bool
    path: Path
    """What rows are read from, or the prefix of a prepared source."""
    is_held_out: bool = False
    """Whether these are rows of the source's own `path`, kept from training."""

    @property
    def label(self) -> str:
        """Return what reports call it."""
        return f"{self.name} (probe)" if self.is_probe else self.name

    @property
    def is_prepared(self) -> bool:
        """Tell whether `path` is the prefix of a prepared source."""
        return not self.path.is_file() and Path(f"{self.path}.idx").is_file()

    def prefix(self, config: RunConfig) -> Path:
        """Return where its prepared form is, or will be."""
        if not self.is_prepared:
            source = Path(config.data.prepared_dir) / self.name
            return probe_prefix(source) if self.is_probe else source
        return probe_prefix(self.path) if self.is_held_out else self.path


def source_files(config: RunConfig) -> Iterator[SourceFile]:
    """Yield all inputs of a run, training rows first, in the order of their dataset_id."""
    for name, source in config.data.sources.items():
        yield SourceFile(name, False, Path(source.path))
    for name, source in config.data.sources.items():
        if source.probe is not None:
            yield SourceFile(name, True, Path(source.probe))
        elif config.data.probe:
            yield SourceFile(name, True, Path(source.path), is_held_out=True)


def read_data(config: RunConfig, tokenizer: Tokenizer) -> Data:
    """Prepare what is not prepared, and pack; both are kept on disk and found again."""
    probes = config.mixing.measures and config.mixing.signal == "probe"
    return Data(
        tokenizer=tokenizer,
        reports=list(prepare_sources(config, tokenizer)),
        train=build_rows(config, tokenizer, probe=False),
        probe=build_rows(config, tokenizer, probe=True) if probes else [],
    )


def prepare_sources(
    config: RunConfig, tokenizer: Tokenizer, workers: int | None = None
) -> Iterator[SourceReport]:
    """Prepare what is not prepared yet, and yield the report of each input as it is done.

    Ranks and nodes may do so at once: one prepares a source, the others wait for it and find it. An input
    that cannot be read, or a prepared one made in another way, is an InputError.
    """
    data = config.data
    renderer = make_renderer(data, tokenizer)
    for file in source_files(config):
        prefix = file.prefix(config)
        recipe = _recipe(config, file, renderer)
        if file.is_prepared or file.is_held_out:
            report = load_report(prefix)
            _refuse_other_recipe(file, report, recipe)
            if data.strict:
                refuse_broken(report.name, report.first_broken)
        else:
            from megatron_dynmix.data.prepare.prepare import prepare_source
            from megatron_dynmix.data.prepare.readers import find_inputs, unread_files

            report = prepare_source(
                name=file.label,
                inputs=find_inputs(file.path),
                prefix=prefix,
                renderer=renderer,
                recipe=recipe,
                unread=unread_files(file.path),
                strict=data.strict,
                workers=workers,
            )
        yield report


def make_renderer(data: DataConfig, tokenizer: Tokenizer) -> Renderer:
    """Return what writes conversations as these settings have it."""
    return Renderer(tokenizer, data.template, data.train_on, data.template_kwargs, data.template_date)


def check_prepared(config: RunConfig, file: SourceFile, tokenizer: Tokenizer) -> None:
    """Refuse an input that is not prepared, or from other rows or in another way; nothing is prepared."""
    prefix = file.prefix(config)
    report = load_report(prefix)
    renderer = make_renderer(config.data, tokenizer)
    _refuse_other_recipe(file, report, _recipe(config, file, renderer))
    if file.is_prepared or file.is_held_out:
        return
    from megatron_dynmix.data.prepare.inputs import current_report
    from megatron_dynmix.data.prepare.readers import find_inputs

    if current_report(prefix, find_inputs(file.path), report.recipe) is None:
        raise InputError(
            f"source {file.label}: {file.path} was changed since it was prepared; run `megatron-dynmix "
            "prepare` for it"
        )


def _recipe(config: RunConfig, file: SourceFile, renderer: Renderer) -> Recipe:
    data, source = config.data, config.data.sources[file.name]
    return Recipe(
        tokenizer=renderer.tokenizer.fingerprint,
        template=renderer.fingerprint,
        format=source.format,
        fields=dict(source.fields),
        roles=dict(source.roles),
        split_length=data.seq_length if data.overlong == "split" else None,
        held_out=0 if file.is_probe or source.probe else data.probe or 0,
    )


def _refuse_other_recipe(file: SourceFile, report: SourceReport, recipe: Recipe) -> None:
    """Refuse a prepared source that was made otherwise; the format that its rows had does not matter."""
    made = report.recipe
    names = {
        "template": "template",
        "split_length": "length at which conversations are split (--overlong split)",
        **({} if file.is_probe else {"held_out": "number of held-out examples (--probe)"}),
    }
    other = ["another tokenizer"] if made.tokenizer != recipe.tokenizer else []
    other += [
        f"{said} {given}, not {wanted}"
        for name, said in names.items()
        if (given := getattr(made, name)) != (wanted := getattr(recipe, name))
    ]
    if other:
        raise InputError(
            f"source {file.label}: {file.path} was prepared with {'; '.join(other)}; prepare it again, or "
            "give what it was prepared with"
        )


def build_rows(config: RunConfig, tokenizer: Tokenizer, *, probe: bool) -> list[PackedRows]:
    """Pack the training (or held-out) examples of each source; packings are cached."""
    return [pack_file(config, file, tokenizer) for file in source_files(config) if file.is_probe == probe]


def pack_file(config: RunConfig, file: SourceFile, tokenizer: Tokenizer) -> PackedRows:
    """Pack the examples of a prepared input, to be read; the packing is cached."""
    from megatron_dynmix.data.rows import PackedRows

    return PackedRows(pack_source(config, file), tokenizer.pad_id)


def pack_source(config: RunConfig, file: SourceFile) -> PackedSource:
    """Pack the examples of a prepared input; the packing is cached."""
    return PackedSource(
        name=file.label,
        prefix=file.prefix(config),
        seq_length=config.data.seq_length,
        seed=config.training.seed if file.is_probe else order_seed(config.training.seed, file.name),
        overlong=config.data.overlong,
        cache_dir=Path(config.data.prepared_dir) / "packing",
        packing=config.data.packing,
        segment_multiple=config.data.segment_multiple,
    )


def plan_blend(config: RunConfig, rows: list[PackedRows], weights_D: np.ndarray) -> BlendPlan:
    """Plan the blend of a fresh run that begins with these weights."""
    from megatron_dynmix.data.blend_plan import BlendPlan

    assert config.training.global_batch_size is not None, "checked before start"
    return BlendPlan(
        [len(source) for source in rows],
        weights_D,
        names=list(config.data.sources),
        seed=config.training.seed,
        chunk_size=config.mixing.interval * config.training.global_batch_size,
    )
