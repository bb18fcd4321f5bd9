"""A checkpoint written as a Hugging Face folder, by one process or by all ranks of a run together.

RUN/checkpoints/hugging_face/       all of the folder that the run began with but its weights
RUN/checkpoints/conversion.json     how that folder was laid out
RUN/hugging_face/iter_0000100/      a model that transformers opens
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_dynmix.checkpoint.folder import folder_of, set_aside
from megatron_dynmix.checkpoint.run_state import read_saved
from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import to_dict
from megatron_dynmix.convert.families import weight_map
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder, copy_files, some
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.origin import CONFIG, CONVERSION, CONVERTED, Origin, keep_origin_of, origin_of
from megatron_dynmix.convert.staging import partial_of
from megatron_dynmix.convert.tensors import AsHuggingFace, Cast, main_type
from megatron_dynmix.convert.to_hugging_face import size_in_bytes, write_weights
from megatron_dynmix.convert.weight_map import EMBEDDING, WeightMap
from megatron_dynmix.errors import InputError, TrainingStopped
from megatron_dynmix.files import name_folder, sync
from megatron_dynmix.job.agreement import RankFailure, together

SHARD_BYTES = size_in_bytes("5GB")


@dataclass(frozen=True)
class Export:
    """A checkpoint seen as a Hugging Face folder."""

    settings: Mapping[str, Any]
    """The `model` section, flat."""
    origin: Origin
    """What goes beside the weights, with the layout of experts that is written."""
    held: Tensors
    """The weights under their Megatron names, in the type that is written."""
    names: WeightMap

    @property
    def weights(self) -> AsHuggingFace:
        """The weights under their Hugging Face names."""
        return AsHuggingFace(self.held, self.names)

    def write_beside(self, folder: Path) -> None:
        """Write all of the folder but the weights."""
        copy_files(self.origin.files, folder)
        (folder / CONFIG).write_text(self.origin.config_text(main_type(self.weights)), encoding="utf-8")


def open_export(
    checkpoint: Path,
    *,
    dtype: str | None = None,
    fused_experts: bool | None = None,
    hf_config: Path | None = None,
) -> Export:
    """Find out what a checkpoint, an `iter_*` folder, is as a Hugging Face folder; no weights are read yet.

    What is not given is found out: the type of the weights, by its name in torch, whether a layer's experts
    are one tensor, and the folder with the model's config.json.
    """
    config = read_saved(checkpoint).config
    settings = config["model"]
    origin = origin_of(config, checkpoint, hf_config)
    held = MegatronCheckpoint(checkpoint)
    if fused_experts is not None:
        origin = replace(origin, fused_experts=fused_experts)
    names = _names_of(held, settings, origin)
    return Export(settings, origin, held if dtype is None else Cast(held, getattr(torch, dtype)), names)


def _names_of(held: MegatronCheckpoint, settings: Mapping[str, Any], origin: Origin) -> WeightMap:
    """Return the map between the two worlds, once the checkpoint is known to be of that model."""
    rows = max(settings["vocab_size"], *held.shapes.get(EMBEDDING, (0,))[:1])
    names = weight_map(settings, origin.config, fused_experts=origin.fused_experts, padded_vocab=rows)
    for kind, absent in (
        ("has no", names.megatron_shapes.keys() - held.shapes.keys()),
        ("has more than the model:", held.shapes.keys() - names.megatron_shapes.keys()),
    ):
        if absent:
            raise InputError(
                f"{held.folder} {kind} {some(absent)}; it is not a checkpoint of the "
                f"{origin.config['model_type']} model that its settings describe"
            )
    for name, shape in names.megatron_shapes.items():
        if held.shapes[name] != shape:
            raise InputError(
                f"{name} is {list(held.shapes[name])} in {held.folder}, and {list(shape)} by its settings; "
                "give another checkpoint"
            )
    return names


def export(checkpoint: Path, destination: Path) -> None:
    """Write a whole checkpoint as a Hugging Face folder, each rank its share of the files.

    A folder that is there is replaced; until the new one is whole, it has another name. Raise `RankFailure`
    on every rank if it cannot be written, and leave nothing.
    """
    staging, rank = partial_of(destination), torch.distributed.get_rank()
    try:
        with together():
            opened = open_export(checkpoint)
            if rank == 0:
                for leftover in destination.parent.glob(".iter_*"):  # of a crash
                    shutil.rmtree(leftover, ignore_errors=True)
                staging.mkdir(parents=True)
        with together():
            write_weights(
                opened.weights,
                staging,
                max_shard_bytes=SHARD_BYTES,
                rank=rank,
                world=torch.distributed.get_world_size(),
                finish=lambda file: sync(staging / file),
            )
        with together():
            if rank == 0:
                opened.write_beside(staging)
                replaced = set_aside(destination)
                name_folder(staging, destination)
                shutil.rmtree(replaced, ignore_errors=True)
    finally:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


def check_save_hf(config: RunConfig, run_dir: Path) -> None:
    """Refuse, as `InputError`, to write Hugging Face folders of a model that no family of theirs is."""
    if config.checkpoint.save_hf is not None:
        origin_of(to_dict(config), folder_of(run_dir / "checkpoints", 0), None)


def keep_origin(config: RunConfig, checkpoints: Path) -> None:
    """Keep what goes beside the weights of the model that a run begins with, if that is Hugging Face's.

    So its checkpoints can be exported when that folder is gone.
    """
    pretrained, load_hf = config.checkpoint.pretrained_checkpoint, config.model.load_hf
    first = torch.distributed.get_rank() == 0
    try:
        with together():
            if first and pretrained is not None and (Path(pretrained) / CONVERTED).is_dir():
                shutil.copytree(Path(pretrained) / CONVERTED, checkpoints / CONVERTED, dirs_exist_ok=True)
                shutil.copyfile(Path(pretrained) / CONVERSION, checkpoints / CONVERSION)
            elif first and load_hf is not None:
                keep_origin_of(HuggingFaceFolder(Path(load_hf)), checkpoints, dtype=None)
    except RankFailure as failure:
        text = f"what goes beside the weights could not be copied to {checkpoints}: {failure}"
        raise TrainingStopped(text if first else "") from None
