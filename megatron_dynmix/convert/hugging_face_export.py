"""A run's checkpoint written as a Hugging Face folder too, by all ranks together.

RUN/checkpoints/hugging_face/       all of the folder that the run began with but its weights
RUN/checkpoints/conversion.json     how that folder was laid out
RUN/hugging_face/iter_0000100/      a model that transformers opens
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_dynmix.checkpoint.checkpoint import folder_of, read_run_state, set_aside, sync
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import to_dict
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder, copy_files
from megatron_dynmix.convert.hf_to_megatron import main_type
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.megatron_to_hf import names_of
from megatron_dynmix.convert.origin import CONFIG, CONVERSION, CONVERTED, Origin, keep_origin_of, origin_of
from megatron_dynmix.convert.staging import partial_of
from megatron_dynmix.convert.tensors import AsHuggingFace
from megatron_dynmix.convert.to_hugging_face import shards_of, size_in_bytes, write_index, write_shard
from megatron_dynmix.errors import TrainingStopped
from megatron_dynmix.job.agreement import RankFailure, together

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
                sync(staging)
                replaced = set_aside(destination)
                staging.rename(destination)
                sync(destination.parent)
                shutil.rmtree(replaced, ignore_errors=True)
    finally:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


def _as_hugging_face(checkpoint: Path, state: Mapping[str, Any], origin: Origin) -> AsHuggingFace:
    held = MegatronCheckpoint(checkpoint)
    names = names_of(held, state["config"]["model"], origin, origin.fused_experts)
    return AsHuggingFace(held, names)
