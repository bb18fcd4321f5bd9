"""Both directions of the command `convert`: write, read back and compare, then give the folder its name.

What `hf_to_megatron` makes:
DST/latest_checkpointed_iteration.txt  iter_0000000/    `checkpoint.pretrained_checkpoint: DST`
DST/model.yaml                                          the `model` section of such a run
DST/hugging_face/                                       all of the source but its weights
DST/conversion.json                                     what it was made from
DST/aside.safetensors                                   what the source holds beside the model, if it does
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_dynmix.checkpoint import folder as checkpoints
from megatron_dynmix.checkpoint.run_state import Damaged, SavedModel
from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.config.presets import complete_model
from megatron_dynmix.convert import aside, tensors, to_megatron
from megatron_dynmix.convert.export_hf import open_export, size_in_bytes, write_weights
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder, carried_files
from megatron_dynmix.convert.logits import compare_logits
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.origin import keep_origin_of, model_of
from megatron_dynmix.convert.staging import Staging, fingerprint
from megatron_dynmix.convert.tensors import Box, Cast, as_hugging_face, as_megatron, main_type, total_size
from megatron_dynmix.convert.to_megatron import write_checkpoint
from megatron_dynmix.convert.verdict import Verdict, compare_kept, compare_values
from megatron_dynmix.convert.weight_files import WeightFiles, some
from megatron_dynmix.convert.weight_map import WeightMap
from megatron_dynmix.data.prepare.progress import ProgressBar
from megatron_dynmix.errors import InputError
from megatron_dynmix.families.names import EMBEDDING
from megatron_dynmix.files import write_atomically

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
    """Make of a Hugging Face folder a checkpoint that runs can start from.

    The weights are cast to `dtype`, by its name in torch, if that is given; the embedding is padded to a
    multiple of so many rows. To `verify` is to read back what was written and compare values and logits.
    """
    if vocab_multiple < 1:
        raise InputError(f"--make-vocab-size-divisible-by is {vocab_multiple}; it must be 1 or more")
    folder = HuggingFaceFolder(source)
    vocab = folder.settings["vocab_size"]
    padded = -(-vocab // vocab_multiple) * vocab_multiple
    names = folder.weight_map(padded)
    cast_to = None if dtype is None else getattr(torch, dtype)
    read: Tensors = folder if cast_to is None else Cast(folder, cast_to, names.float32)
    wanted = as_megatron(read, names)
    total = total_size(wanted)
    settings = complete_model({"preset": None, **folder.settings})
    plan = {
        "source": {str(source.resolve()): fingerprint(source)},
        "dtype": dtype,
        "padding": padded,
        "size of parts": [to_megatron.PART_BYTES, tensors.BOX_BYTES],
    }
    with Staging(destination, plan, say) as staging:
        beside = total_size(folder.aside) + sum(
            path.stat().st_size for path in carried_files(source).values()
        )
        staging.check_space(total + beside)
        target = checkpoints.folder_of(staging.folder, 0)
        with ProgressBar("writing", total) as progress:
            order = _reading_order(folder, names)
            sums = write_checkpoint(wanted, order, staging, target.name, advance=progress.advance)
        _write_beside(target, folder, settings, dtype, sums)
        groups = logits = None
        if verify:
            written = MegatronCheckpoint(target)
            groups = compare_values(folder, as_hugging_face(written, names), names, cast_to)
            if folder.aside.shapes:
                groups += [compare_kept(folder.aside, WeightFiles({staging.folder / aside.FILE: None}))]
            logits = compare_logits(source, folder, written, model_of(settings), cast_to, names.float32)
        verdict = Verdict(
            folder=staging.folder,
            read=len(folder.shapes),
            written=len(wanted.shapes),
            dtype=main_type(wanted),
            computed=folder.computed,
            aside=(*folder.aside.shapes,),
            notes=(*_kept(names, cast_to), *_dequantized(folder)),
            padding=f"{padded - vocab} rows of zeros added to {vocab}" if padded > vocab else "none",
            groups=groups,
            logits=logits,
        )
        return _completed(staging, verdict)


def megatron_to_hf(
    source: Path,
    destination: Path,
    *,
    dtype: str | None,
    max_shard_size: str,
    fused_experts: bool | None,
    hf_config: Path | None,
    verify: bool,
    say: Callable[[str], None],
) -> Verdict:
    """Make of a checkpoint a Hugging Face folder.

    `source` is a run, its checkpoints folder, an `iter_*` folder or a converted folder. What `fused_experts`
    and `hf_config` do not say is as in the model's origin. The rest is as in `hf_to_megatron`.
    """
    max_shard_bytes = size_in_bytes(max_shard_size)
    checkpoint = checkpoint_of(source)
    if verify:
        _check_contents(checkpoint)
    cast_to = None if dtype is None else getattr(torch, dtype)
    export = open_export(checkpoint, dtype=cast_to, fused_experts=fused_experts, hf_config=hf_config)
    wanted, names, origin = export.tensors, export.names, export.origin
    total = total_size(wanted)
    plan = {
        "source": {str(checkpoint.resolve()): fingerprint(checkpoint)},
        "dtype": dtype,
        "layout": [max_shard_bytes, origin.fused_experts],
    }
    with Staging(destination, plan, say) as staging:
        staging.check_space(total + sum(path.stat().st_size for path in origin.files.values()))
        with ProgressBar("writing", total) as progress:
            write_weights(
                wanted,
                staging.folder,
                max_shard_bytes=max_shard_bytes,
                finished=staging.finished,
                finish=staging.record,
                advance=progress.advance,
            )
        export.write_beside(staging.folder)
        groups = logits = None
        if verify:
            written = HuggingFaceFolder(staging.folder)
            groups = compare_values(as_hugging_face(export.held, names), written, names, cast_to)
            if origin.aside.shapes:
                groups += [compare_kept(origin.aside, written.aside)]
            logits = compare_logits(staging.folder, written, export.cast, model_of(export.settings))
        rows, vocab = names.megatron_shapes[EMBEDDING][0], export.settings["vocab_size"]
        verdict = Verdict(
            folder=staging.folder,
            read=len(names.megatron_shapes),
            written=len(export.weights.shapes),
            dtype=main_type(export.weights),
            padding=f"{rows - vocab} rows taken off {rows}" if rows > vocab else "none",
            notes=(*_kept(names, cast_to), *origin.notes),
            groups=groups,
            logits=logits,
        )
        return _completed(staging, verdict)


def _kept(names: WeightMap, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Say which tensors were not cast with the others."""
    kept = names.float32 & names.hf_shapes.keys()
    if not kept or dtype in (None, torch.float32):
        return ()
    return (f"float32 as in transformers, and not cast: {some(kept)}",)


def _dequantized(folder: HuggingFaceFolder) -> tuple[str, ...]:
    """Say that weights were quantized."""
    if folder.quantization is None:
        return ()
    return (f"the weights were {folder.quantization.describe()}, and are {folder.quantization.dtype} now",)


def _completed(staging: Staging, verdict: Verdict) -> Verdict:
    """Give the folder its name, unless something is wrong."""
    if verdict.passed:
        staging.complete()
        verdict = dataclasses.replace(verdict, folder=staging.final)
    return verdict


def _reading_order(folder: HuggingFaceFolder, names: WeightMap) -> Callable[[Box], Any]:
    """Sort boxes by where in the folder their first numbers are; those of padding alone come last."""

    def place(box: Box) -> Any:
        part = next(names.megatron.parts_in(box.name, box.offset, box.shape), None)
        if part is None:
            return (1, "", box.name, box.offset)
        block = part.block
        return (0, folder.file_of[block.hf].name, block.hf, block.hf_offset, box.offset)

    return place


def _write_beside(
    target: Path,
    folder: HuggingFaceFolder,
    settings: Mapping[str, Any],
    dtype: str | None,
    sums: Mapping[str, tuple[int, str]],
) -> None:
    """Write what makes shards a checkpoint of ours, and what runs that start from it want beside it."""
    root = target.parent
    keep_origin_of(folder, root, dtype=dtype)
    section = yaml.safe_dump({"model": dict(settings)}, sort_keys=False, allow_unicode=True)
    (root / MODEL_YAML).write_text(section, encoding="utf-8")
    checkpoints.complete(target, SavedModel(config={"model": dict(settings)}).text(), sums)
    write_atomically(root / checkpoints.TRACKER, "0")


def checkpoint_of(source: Path) -> Path:
    """Return the `iter_*` folder that is meant; refuse one that is damaged."""
    if (source / ".metadata").is_file():
        try:
            checkpoints.check_whole(source)
        except Damaged as damage:
            raise InputError(f"{source} is damaged: {damage}; give another checkpoint") from None
        return source
    for directory in (source, source / "checkpoints"):
        if checkpoints.has_checkpoint(directory):
            return checkpoints.exact(checkpoints.newest_good(directory))
    what = "holds no checkpoint" if source.is_dir() else "is not a folder"
    raise InputError(
        f"{source} {what}; give a run, its checkpoints folder, one iter_* folder or what hf-to-megatron made"
    )


def _check_contents(checkpoint: Path) -> None:
    """Read a checkpoint against its checksums: what is made of it would be as wrong, and compare as equal."""
    sums = checkpoints.read_checksums(checkpoint)
    try:
        with ProgressBar("checking", sum(size for size, _ in sums.values())) as progress:
            for name, (size, _) in sums.items():
                checkpoints.check_contents(checkpoint, sums, [name])
                progress.advance(size)
    except Damaged as damage:
        raise InputError(f"{checkpoint} is damaged: {damage}; give another checkpoint") from None
