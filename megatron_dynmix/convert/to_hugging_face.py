"""The weights of a Hugging Face folder as safetensors files, written by one process or by several together.

A file is the length of its header (8 bytes, little-endian), the header (JSON: each tensor's type, shape and
place), then the tensors without gaps. It is written box by box: memory does not grow with a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import torch

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.convert.hf_folder import DTYPES, INDEX, SINGLE
from megatron_dynmix.convert.tensors import boxes_of, grouped, read_bytes, size_of, total_size
from megatron_dynmix.errors import InputError

HEADER_ALIGNMENT = 8
TYPE_NAMES = {torch.float64: "F64", **{dtype: name for name, dtype in DTYPES.items()}}
"""What safetensors calls the types."""


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
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


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
        _write_index(tensors, shards, folder)


def _write_index(tensors: Tensors, shards: Mapping[str, list[str]], folder: Path) -> None:
    """Write the list of which file holds which tensor."""
    index = {
        "metadata": {
            "total_parameters": sum(map(math.prod, tensors.shapes.values())),
            "total_size": total_size(tensors),
        },
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_shard(tensors: Tensors, names: list[str], path: Path, advance: Callable[[int], object]) -> None:
    """Write one file of weights; `advance` is told of bytes that were written."""
    # the larger types first: then every number lies at a multiple of its size
    ordered = sorted(names, key=lambda name: -tensors.dtypes[name].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        begin, end = end, end + size_of(tensors, name)
        kind, shape = TYPE_NAMES[tensors.dtypes[name]], list(tensors.shapes[name])
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in ordered:
            for box in boxes_of(tensors, name):
                file.write(read_bytes(tensors, box).data)
                advance(box.nbytes)
