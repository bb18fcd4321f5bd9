"""From a Hugging Face folder to a checkpoint that a run can start from.

DST/latest_checkpointed_iteration.txt  iter_0000000/    `checkpoint.pretrained_checkpoint: DST`
DST/model.yaml                                          the `model` section of such a run
DST/hugging_face/                                       all of the folder but its weights
DST/conversion.json                                     what it was made from
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

from megatron_dynmix.checkpoint.checkpoint import (
    FORMAT_VERSION,
    RUN_STATE,
    TRACKER,
    folder_of,
    write_atomically,
)
from megatron_dynmix.checkpoint.checksums import CHECKSUMS, checksum, checksums_text, files_of
from megatron_dynmix.config.shape import complete_model
from megatron_dynmix.convert.blocks import WeightMap
from megatron_dynmix.convert.boxes import Box, Cast, size_of
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder, carried_files
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.model_check import compare_logits
from megatron_dynmix.convert.origin import keep_origin_of, model_of
from megatron_dynmix.convert.staging import Staging, fingerprint
from megatron_dynmix.convert.tensors import AsHuggingFace, AsMegatron, Tensors
from megatron_dynmix.convert.to_megatron import write_checkpoint
from megatron_dynmix.convert.verdict import Verdict, compare_values
from megatron_dynmix.data.prepare.progress import Progress
from megatron_dynmix.errors import InputError

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
