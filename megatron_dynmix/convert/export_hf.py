"""From a checkpoint to a Hugging Face folder: a run's newest, one of its checkpoints, or a converted one.

A run's checkpoint written as a Hugging Face folder too, by all ranks together.

RUN/checkpoints/hugging_face/       all of the folder that the run began with but its weights
RUN/checkpoints/conversion.json     how that folder was laid out
RUN/hugging_face/iter_0000100/      a model that transformers opens
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_dynmix.checkpoint import restore_point
from megatron_dynmix.checkpoint.folder import (
    check_contents,
    check_sizes,
    folder_of,
    read_checksums,
    set_aside,
)
from megatron_dynmix.checkpoint.run_state import Damaged, read_run_state
from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import to_dict
from megatron_dynmix.convert.families import weight_map
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder, copy_files
from megatron_dynmix.convert.import_hf import completed, main_type
from megatron_dynmix.convert.logits import compare_logits
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.origin import (
    CONFIG,
    CONVERSION,
    CONVERTED,
    Origin,
    keep_origin_of,
    model_of,
    origin_of,
)
from megatron_dynmix.convert.staging import Staging, fingerprint, partial_of
from megatron_dynmix.convert.tensors import AsHuggingFace, Cast, size_of
from megatron_dynmix.convert.to_hugging_face import (
    shards_of,
    size_in_bytes,
    write_index,
    write_shard,
    write_weights,
)
from megatron_dynmix.convert.verdict import Verdict, compare_values
from megatron_dynmix.convert.weight_map import WeightMap
from megatron_dynmix.data.prepare.progress import Progress
from megatron_dynmix.errors import InputError, TrainingStopped
from megatron_dynmix.files import name_folder, sync
from megatron_dynmix.job.agreement import RankFailure, together

EMBEDDING = "embedding.word_embeddings.weight"
SHOWN = 3


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
    """Convert, compare, and give the folder its name if all is well.

    Args:
        source: a run, its checkpoints folder, an `iter_*` folder or a converted folder.
        destination: a folder that is not there yet, or is empty.
        dtype: type of the weights, by its name in torch; theirs if None.
        max_shard_size: of one file, such as `5GB`.
        fused_experts: whether a layer's experts are one tensor; as in their origin if None.
        hf_config: a folder with the model's config.json; found out if None.
        verify: read back what was written, and compare values and logits.
        say: prints a line.

    Raises:
        InputError: the source, the destination or the disk is not fit for it.

    """
    shard_bytes = size_in_bytes(max_shard_size)
    folder = checkpoint_of(source)
    if verify:
        _check_contents(folder)
    state = read_run_state(folder)
    settings = state["config"]["model"]
    origin = origin_of(state, folder, hf_config)
    fused = origin.fused_experts if fused_experts is None else fused_experts
    held = MegatronCheckpoint(folder)
    names = names_of(held, settings, origin, fused)
    read: Tensors = held if dtype is None else Cast(held, getattr(torch, dtype))
    wanted = AsHuggingFace(read, names)
    total = sum(size_of(wanted, name) for name in wanted.shapes)
    plan = {
        "source": {str(folder.resolve()): fingerprint(folder)},
        "dtype": dtype,
        "layout": [shard_bytes, fused],
    }
    with Staging(destination, plan, say) as staging, staging.on_full_disk():
        staging.check_space(total + sum(path.stat().st_size for path in origin.files.values()))
        with Progress("writing", total) as progress:
            write_weights(wanted, staging, max_shard_bytes=shard_bytes, advance=progress.advance)
        copy_files(origin.files, staging.folder)
        (staging.folder / CONFIG).write_text(origin.config_text(main_type(wanted)), encoding="utf-8")
        verdict = Verdict(
            folder=staging.folder,
            read=len(names.megatron_shapes),
            written=len(wanted.shapes),
            dtype=main_type(wanted),
            padding=_padding(held.shapes[EMBEDDING][0], settings["vocab_size"]),
            notes=origin.notes,
        )
        if verify:
            written = HuggingFaceFolder(staging.folder)
            with Progress("comparing", total) as progress:
                groups = compare_values(wanted, written, names, progress.advance)
            logits = compare_logits(staging.folder, written, read, model_of(settings))
            verdict = dataclasses.replace(verdict, groups=groups, logits=logits)
        return completed(staging, verdict)


def checkpoint_of(source: Path) -> Path:
    """The `iter_*` folder that is meant.

    Raises:
        InputError: none, or one that is damaged.

    """
    if (source / ".metadata").is_file():
        try:
            check_sizes(source, read_checksums(source))
            read_run_state(source)
        except Damaged as damage:
            raise InputError(f"{source} is damaged: {damage}; give another checkpoint") from None
        return source
    for directory in (source, source / "checkpoints"):
        if restore_point.has_checkpoint(directory):
            return restore_point.exact(restore_point.newest_good(directory))
    what = "holds no checkpoint" if source.is_dir() else "is no folder"
    raise InputError(
        f"{source} {what}; give a run, its checkpoints folder, one iter_* folder or what hf-to-megatron made"
    )


def _check_contents(folder: Path) -> None:
    """Read a checkpoint against its checksums: what is made of it would be as wrong, and compare as equal.

    Raises:
        InputError: it is not what was written.

    """
    sums = read_checksums(folder)
    try:
        with Progress("checking", sum(size for size, _ in sums.values())) as progress:
            for name, (size, _) in sums.items():
                check_contents(folder, sums, [name])
                progress.advance(size)
    except Damaged as damage:
        raise InputError(f"{folder} is damaged: {damage}; give another checkpoint") from None


def names_of(held: MegatronCheckpoint, settings: dict[str, object], origin: Origin, fused: bool) -> WeightMap:
    """Where the checkpoint's numbers are in a Hugging Face folder, once it is known to be of that model.

    Raises:
        InputError: it is of another model.

    """
    rows = held.shapes.get(EMBEDDING, (0,))[0]
    vocab = settings["vocab_size"]
    assert isinstance(vocab, int), "a checkpoint of ours says its vocabulary"
    names = weight_map(settings, origin.config, fused_experts=fused, padded_vocab=max(rows, vocab))
    for kind, absent in (
        ("has no", names.megatron_shapes.keys() - held.shapes.keys()),
        ("has more than the model:", held.shapes.keys() - names.megatron_shapes.keys()),
    ):
        if absent:
            more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
            raise InputError(
                f"{held.folder} {kind} {', '.join(sorted(absent)[:SHOWN])}{more}; it is not a checkpoint of "
                f"the {origin.config['model_type']} model that its settings describe"
            )
    for name, shape in names.megatron_shapes.items():
        if held.shapes[name] != shape:
            raise InputError(
                f"{name} is {list(held.shapes[name])} in {held.folder}, and {list(shape)} by its settings; "
                "give another checkpoint"
            )
    return names


def _padding(rows: int, vocab: int) -> str:
    return f"{rows - vocab} rows taken off {rows}" if rows > vocab else "none"


SHARD_BYTES = size_in_bytes("5GB")


def check_save_hf(config: RunConfig, run_dir: Path) -> None:
    """Refuse to write Hugging Face folders of a model that no family of theirs is.

    Raises:
        InputError: what is wrong.

    """
    if config.checkpoint.save_hf is not None:
        origin_of({"config": to_dict(config)}, folder_of(run_dir / "checkpoints", 0), None)


def keep_origin(config: RunConfig, checkpoints: Path) -> None:
    """Keep what goes beside the weights of the model that a run begins with, if that is Hugging Face's.

    So its checkpoints can be exported when that folder is gone.

    Raises:
        TrainingStopped: on every rank, if it cannot be written.

    """
    try:
        with together():
            if torch.distributed.get_rank() == 0:
                _write_origin(config, checkpoints)
    except RankFailure as failure:
        text = f"what goes beside the weights could not be copied to {checkpoints}: {failure}"
        raise TrainingStopped(text if torch.distributed.get_rank() == 0 else "") from None


def _write_origin(config: RunConfig, checkpoints: Path) -> None:
    pretrained, load_hf = config.checkpoint.pretrained_checkpoint, config.model.load_hf
    if pretrained is not None and (Path(pretrained) / CONVERTED).is_dir():
        shutil.copytree(Path(pretrained) / CONVERTED, checkpoints / CONVERTED, dirs_exist_ok=True)
        shutil.copyfile(Path(pretrained) / CONVERSION, checkpoints / CONVERSION)
    elif load_hf is not None:
        keep_origin_of(HuggingFaceFolder(Path(load_hf)), checkpoints, dtype=None)


def export(checkpoint: Path, destination: Path) -> None:
    """Write a whole checkpoint as a Hugging Face folder, each rank its share of the files.

    A folder that is there is replaced; until the new one is whole, it has another name.

    Args:
        checkpoint: an `iter_*` folder that all ranks see.
        destination: the folder's name in the end.

    Raises:
        RankFailure: on every rank, if it cannot be written; what was begun is gone again.

    """
    staging, rank = partial_of(destination), torch.distributed.get_rank()
    try:
        with together():
            state = read_run_state(checkpoint)
            origin = origin_of(state, checkpoint, None)
            weights = _as_hugging_face(checkpoint, state, origin)
            shards = shards_of(weights, SHARD_BYTES)
            if rank == 0:
                for leftover in destination.parent.glob(".iter_*"):  # of a crash
                    shutil.rmtree(leftover, ignore_errors=True)
                staging.mkdir(parents=True)
        with together():
            for file in list(shards)[rank :: torch.distributed.get_world_size()]:
                write_shard(weights, shards[file], staging / file, lambda written: None)
                sync(staging / file)
        with together():
            if rank == 0:
                write_index(weights, shards, staging)
                copy_files(origin.files, staging)
                (staging / CONFIG).write_text(origin.config_text(main_type(weights)), encoding="utf-8")
                replaced = set_aside(destination)
                name_folder(staging, destination)
                shutil.rmtree(replaced, ignore_errors=True)
    finally:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


def _as_hugging_face(checkpoint: Path, state: Mapping[str, Any], origin: Origin) -> AsHuggingFace:
    held = MegatronCheckpoint(checkpoint)
    names = names_of(held, state["config"]["model"], origin, origin.fused_experts)
    return AsHuggingFace(held, names)
