"""A checkpoint written as a Hugging Face folder, by one process or by all ranks of a run together.

RUN/checkpoints/hugging_face/       all of the folder that the run began with but its weights
RUN/checkpoints/conversion.json     how that folder was laid out
RUN/checkpoints/aside.safetensors   tensors of it that are no part of the model, if there were any
RUN/hugging_face/iter_0000100/      a model that transformers opens
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_dynmix.checkpoint.folder import folder_of, set_aside
from megatron_dynmix.checkpoint.run_state import read_saved
from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import to_dict
from megatron_dynmix.convert import aside
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder, copy_files
from megatron_dynmix.convert.interleaved import as_published
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.origin import CONFIG, CONVERSION, CONVERTED, Origin, keep_origin_of, origin_of
from megatron_dynmix.convert.staging import partial_of
from megatron_dynmix.convert.tensors import (
    Cast,
    Named,
    Seen,
    Together,
    as_hugging_face,
    grouped,
    main_type,
    size_of,
    total_size,
)
from megatron_dynmix.convert.weight_files import INDEX, SINGLE, some, write_shard
from megatron_dynmix.convert.weight_map import WeightMap
from megatron_dynmix.errors import InputError, TrainingStopped
from megatron_dynmix.families.names import EMBEDDING
from megatron_dynmix.files import name_folder, sync
from megatron_dynmix.job.agreement import RankFailure, together
from megatron_dynmix.lease import Lease

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Export:
    """A checkpoint seen as a Hugging Face folder, with experts and numbers as they are written."""

    settings: Mapping[str, Any]
    """The `model` section, flat."""
    origin: Origin
    held: Tensors
    """The weights under their Megatron names, in the types of the checkpoint."""
    names: WeightMap
    dtype: torch.dtype | None
    """Type that they are cast to, if it is another."""

    @property
    def cast(self) -> Tensors:
        """The weights under their Megatron names, in the types that are written."""
        return self.held if self.dtype is None else Cast(self.held, self.dtype, self.names.float32)

    @property
    def weights(self) -> Seen:
        """The model's weights under their Hugging Face names, in the types that are written."""
        return as_hugging_face(self.cast, self.names)

    @property
    def tensors(self) -> Tensors:
        """All that is written, by its names in the folder."""
        prefix, published = self.origin.prefix, as_published(self.weights, self.origin.text)
        named = Named(published, {aside.in_folder(name, prefix): name for name in published.shapes})
        return Together(named, self.origin.aside)

    def write_beside(self, folder: Path) -> None:
        """Write all of the folder but the weights."""
        copy_files(self.origin.files, folder)
        key = "dtype" if "dtype" in self.origin.config else "torch_dtype"
        config = {**self.origin.config, key: main_type(self.weights)}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")


def open_export(
    checkpoint: Path,
    *,
    dtype: torch.dtype | None = None,
    fused_experts: bool | None = None,
    hf_config: Path | None = None,
) -> Export:
    """Find out what a checkpoint, an `iter_*` folder, is as a Hugging Face folder; no weights are read yet.

    What is not given is found out: the type of the weights, whether a layer's experts are one tensor, and the
    folder with the model's config.json.
    """
    config = read_saved(checkpoint).config
    settings = config["model"]
    origin = origin_of(config, checkpoint, hf_config)
    held = MegatronCheckpoint(checkpoint)
    if fused_experts is not None:
        origin = replace(origin, fused_experts=fused_experts)
    names = _names_of(held, settings, origin)
    return Export(settings, origin, held, names, dtype)


def _names_of(held: MegatronCheckpoint, settings: Mapping[str, Any], origin: Origin) -> WeightMap:
    """Return the map between the two worlds, once the checkpoint is known to be of that model."""
    rows = max(settings["vocab_size"], *held.shapes.get(EMBEDDING, (0,))[:1])
    names = weight_map(settings, origin.text, fused_experts=origin.fused_experts, padded_vocab=rows)
    wanted = names.megatron_shapes
    for kind, absent in (
        ("has no", wanted.keys() - held.shapes.keys()),
        ("has more than the model:", held.shapes.keys() - wanted.keys()),
    ):
        if absent:
            raise InputError(
                f"{held.folder} {kind} {some(absent)}; it is not a checkpoint of the "
                f"{origin.text['model_type']} model that its settings describe"
            )
    for name, shape in wanted.items():
        if held.shapes[name] != shape:
            raise InputError(
                f"{name} is {list(held.shapes[name])} in {held.folder}, and {list(shape)} by its settings; "
                "give another checkpoint"
            )
    return names


def size_in_bytes(text: str) -> int:
    """Read a size such as `5GB` (powers of ten, as `transformers` reads it), `512MiB` or plain bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise InputError(f"a size of {text!r} cannot be read; give it as 5GB, 512MiB or a number of bytes")
    exponent = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def shards_of(tensors: Tensors, max_bytes: int) -> dict[str, list[str]]:
    """Return the files and the tensors of each, in the order they are named."""
    shards = grouped(tensors.shapes, lambda name: size_of(tensors, name), max_bytes)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    of = f"of-{len(shards):05d}.safetensors"
    return {f"model-{number:05d}-{of}": names for number, names in enumerate(shards, start=1)}


def write_weights(
    tensors: Tensors,
    folder: Path,
    *,
    max_shard_bytes: int,
    rank: int = 0,
    world: int = 1,
    finished: Container[str] = (),
    finish: Callable[[str], None] = lambda file: None,
    advance: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write one rank's share of the files of a model, and on the first rank the index if there are several.

    Files that are `finished` are not written again; `finish` is called with the name of each that was
    written, and `advance` with bytes that were written or were there already.
    """
    shards = shards_of(tensors, max_shard_bytes)
    for file in list(shards)[rank::world]:
        if file in finished:
            advance(sum(size_of(tensors, name) for name in shards[file]))
            continue
        write_shard(tensors, shards[file], folder / file, advance)
        finish(file)
    if rank == 0 and len(shards) > 1:
        parameters = sum(map(math.prod, tensors.shapes.values()))
        index = {
            "metadata": {"total_parameters": parameters, "total_size": total_size(tensors)},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export(checkpoint: Path, destination: Path, lease: Lease | None = None) -> None:
    """Write a whole checkpoint as a Hugging Face folder, each rank its share of the files.

    A folder that is there is replaced; until the new one is whole, it has another name. Raise `RankFailure`
    on every rank if it cannot be written, or rank 0's lease of the place is lost, and leave nothing.
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
                opened.tensors,
                staging,
                max_shard_bytes=SHARD_BYTES,
                rank=rank,
                world=torch.distributed.get_world_size(),
                finish=lambda file: sync(staging / file),
            )
        with together():
            if rank == 0:
                opened.write_beside(staging)
                if lease is not None:
                    lease.check()
                replaced = set_aside(destination)
                name_folder(staging, destination)
                shutil.rmtree(replaced, ignore_errors=True)
    finally:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


def check_export(config: RunConfig, run_dir: Path) -> None:
    """Refuse, as `InputError`, to write Hugging Face folders of a model that no family of theirs is."""
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
                for name in (CONVERSION, aside.FILE):
                    if (Path(pretrained) / name).is_file():
                        shutil.copyfile(Path(pretrained) / name, checkpoints / name)
            elif first and load_hf is not None:
                keep_origin_of(HuggingFaceFolder(Path(load_hf)), checkpoints, dtype=None)
    except RankFailure as failure:
        text = f"what goes beside the weights could not be copied to {checkpoints}: {failure}"
        raise TrainingStopped(text if first else "") from None
