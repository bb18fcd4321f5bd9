"""From a Hugging Face folder to a checkpoint that a run can start from.

DST/latest_checkpointed_iteration.txt  iter_0000000/    `checkpoint.pretrained_checkpoint: DST`
DST/model.yaml                                          the `model` section of such a run
DST/hugging_face/                                       all of the folder but its weights
DST/conversion.json                                     what it was made from

Training from a Hugging Face folder, and to one.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_dynmix.checkpoint.checkpointer import Checkpointer
from megatron_dynmix.checkpoint.folder import (
    CHECKSUMS,
    TRACKER,
    checksum,
    checksums_text,
    files_of,
    folder_of,
)
from megatron_dynmix.checkpoint.run_state import FORMAT_VERSION, RUN_STATE
from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.commands.convert import prediction_text
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.hugging_face import flat_settings
from megatron_dynmix.config.megatron import padded_vocab_size
from megatron_dynmix.config.presets import complete_model, other_shape
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder, carried_files
from megatron_dynmix.convert.logits import compare_logits
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.origin import keep_origin_of, model_of
from megatron_dynmix.convert.staging import Staging, fingerprint
from megatron_dynmix.convert.tensors import AsHuggingFace, AsMegatron, Box, Cast, size_of
from megatron_dynmix.convert.to_megatron import write_checkpoint
from megatron_dynmix.convert.verdict import Verdict, compare_values
from megatron_dynmix.convert.weight_map import WeightMap
from megatron_dynmix.data.prepare.progress import Progress
from megatron_dynmix.errors import InputError, TrainingStopped
from megatron_dynmix.files import write_atomically
from megatron_dynmix.job.agreement import RankFailure, together

MODEL_YAML = "model.yaml"


def hf_to_megatron(
    source: Path,
    destination: Path,
    *,
    dtype: str | None,
    vocab_multiple: int,
    verify: bool,
    say: Callable[[str], None],
) -> Verdict:
    """Convert, compare, and give the folder its name if all is well.

    Args:
        source: a Hugging Face folder.
        destination: a folder that is not there yet, or is empty.
        dtype: type of the weights, by its name in torch; theirs if None.
        vocab_multiple: the embedding is padded to a multiple of so many rows.
        verify: read back what was written, and compare values and logits.
        say: prints a line.

    Raises:
        InputError: the source, the destination or the disk is not fit for it.

    """
    if vocab_multiple < 1:
        raise InputError(f"--make-vocab-size-divisible-by is {vocab_multiple}; it must be 1 or more")
    folder = HuggingFaceFolder(source)
    vocab = folder.settings["vocab_size"]
    padded = -(-vocab // vocab_multiple) * vocab_multiple
    names = folder.weight_map(padded)
    read: Tensors = folder if dtype is None else Cast(folder, getattr(torch, dtype))
    wanted = AsMegatron(read, names)
    total = sum(size_of(wanted, name) for name in wanted.shapes)
    settings = complete_model({"preset": None, **folder.settings})
    plan = {"source": {str(source.resolve()): fingerprint(source)}, "dtype": dtype, "padding": padded}
    with Staging(destination, plan, say) as staging, staging.on_full_disk():
        staging.check_space(total + sum(path.stat().st_size for path in carried_files(source).values()))
        target = folder_of(staging.folder, 0)
        with Progress("writing", total) as progress:
            sums = write_checkpoint(
                wanted,
                _reading_order(folder, names),
                staging,
                target.name,
                checksum=checksum,
                advance=progress.advance,
            )
        _write_beside(staging.folder, folder, settings, dtype)
        _complete_checkpoint(target, settings, sums)
        verdict = Verdict(
            folder=staging.folder,
            read=len(folder.shapes),
            written=len(wanted.shapes),
            dtype=main_type(wanted),
            computed=folder.computed,
            predicting=folder.predicting,
            padding=_padding(vocab, padded),
        )
        if verify:
            written = MegatronCheckpoint(target)
            with Progress("comparing", total) as progress:
                groups = compare_values(read, AsHuggingFace(written, names), names, progress.advance)
            logits = compare_logits(
                source, read, written, model_of(settings), rounded=_rounded(folder, dtype)
            )
            verdict = dataclasses.replace(verdict, groups=groups, logits=logits)
        return completed(staging, verdict)


def completed(staging: Staging, verdict: Verdict) -> Verdict:
    """Give the folder its name, unless something is wrong."""
    if not verdict.passed:
        return verdict
    staging.complete()
    return dataclasses.replace(verdict, folder=staging.final)


def main_type(tensors: Tensors) -> str:
    """Type of most of the numbers, by its name in torch."""
    sizes: Counter[torch.dtype] = Counter()
    for name in tensors.shapes:
        sizes[tensors.dtypes[name]] += size_of(tensors, name)
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def _padding(vocab: int, padded: int) -> str:
    return f"{padded - vocab} rows of zeros added to {vocab}" if padded > vocab else "none"


def _rounded(tensors: Tensors, dtype: str | None) -> bool:
    """Whether numbers lose digits."""
    given = set(tensors.dtypes.values())
    return dtype is not None and dtype != "float32" and given != {getattr(torch, dtype)}


def _reading_order(folder: HuggingFaceFolder, names: WeightMap) -> Callable[[Box], Any]:
    """Sorts boxes by where in the folder their first numbers are; those of padding alone come last."""

    def place(box: Box) -> Any:
        block = next(names.megatron.blocks_in(box.name, box.offset, box.shape), None)
        if block is None:
            return (1, "", box.name, box.offset)
        return (0, folder.file_of[block.hf].name, block.hf, block.hf_offset, box.offset)

    return place


def _write_beside(
    root: Path, folder: HuggingFaceFolder, settings: Mapping[str, Any], dtype: str | None
) -> None:
    """Write what is no checkpoint: what the folder holds beside weights, the model section, the origin."""
    keep_origin_of(folder, root, dtype=dtype)
    section = yaml.safe_dump({"model": dict(settings)}, sort_keys=False, allow_unicode=True)
    (root / MODEL_YAML).write_text(section, encoding="utf-8")


def _complete_checkpoint(
    target: Path, settings: Mapping[str, Any], sums: Mapping[str, tuple[int, str]]
) -> None:
    """Write what makes shards a checkpoint of ours: run state, checksums, the tracker."""
    state = {"format_version": FORMAT_VERSION, "iteration": 0, "config": {"model": dict(settings)}}
    write_atomically(target / RUN_STATE, json.dumps(state))
    rest = {name: checksum(target / name) for name in files_of(target) if name not in sums}
    write_atomically(target / CHECKSUMS, checksums_text({**sums, **rest}))
    write_atomically(target.parent / TRACKER, "0")


def folder_for(folder: Path, config: RunConfig) -> HuggingFaceFolder:
    """A Hugging Face folder that has the weights of this model; only names, types and shapes are looked at.

    Raises:
        InputError: a folder that cannot be read, or that is of another model.

    """
    source = HuggingFaceFolder(folder)
    model = flat_settings(config.model)
    if differing := other_shape(source.settings, model):
        changes = ", ".join(
            f"{name} {source.settings.get(name)} (now {model.get(name)})" for name in differing
        )
        raise InputError(f"{folder} holds another model: {changes}; give the settings of its config.json")
    return source


def weights_of(source: HuggingFaceFolder, config: RunConfig) -> Tensors:
    """The weights of a folder, named and laid out as in a checkpoint; read when they are asked for."""
    return AsMegatron(source, source.weight_map(padded_vocab_size(config)))


def check_load_hf(config: RunConfig) -> None:
    """Refuse a Hugging Face folder that a fresh run cannot start from.

    Raises:
        InputError: what is wrong.

    """
    if config.model.load_hf is None:
        return
    if config.checkpoint.pretrained_checkpoint is not None:
        raise InputError(
            f"model.load_hf ({config.model.load_hf}) and checkpoint.pretrained_checkpoint "
            f"({config.checkpoint.pretrained_checkpoint}) are both given, but a run starts from the weights "
            "of one; leave out the other"
        )
    folder_for(Path(config.model.load_hf), config)


def load_hugging_face(config: RunConfig, checkpointer: Checkpointer, say: Callable[[str], None]) -> None:
    """Start from the weights of `model.load_hf`, each rank from its own slices of them.

    Raises:
        TrainingStopped: on every rank, if one cannot read the folder.

    """
    assert config.model.load_hf is not None, "asked before"
    folder = Path(config.model.load_hf)
    say(f" loading weights from {folder}")
    try:
        with together():
            source = folder_for(folder, config)
        if source.predicting:
            say(f" not loaded: {prediction_text(source.predicting)}")
        checkpointer.load_tensors(weights_of(source, config))
    except RankFailure as failure:
        text = f"the weights of {folder} could not be read: {failure}"
        raise TrainingStopped(text if torch.distributed.get_rank() == 0 else "") from None
    say(f" successfully loaded weights from {folder}")
