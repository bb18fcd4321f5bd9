"""Safetensors files of a Hugging Face folder, written box by box as the format lays them out.

A file is the length of its header (8 bytes, little-endian), the header (JSON: each tensor's type, shape and
place), then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.convert.hf_folder import INDEX, SINGLE
from megatron_dynmix.convert.staging import Staging
from megatron_dynmix.convert.tensors import boxes_of, size_of
from megatron_dynmix.errors import InputError

HEADER_ALIGNMENT = 8
TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""What safetensors calls the types."""


def size_in_bytes(text: str) -> int:
    """Read a size such as `5GB` (powers of ten, as `transformers` reads it), `512MiB` or plain bytes.

    Raises:
        InputError: it is no size.

    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise InputError(f"a size of {text!r} cannot be read; give it as 5GB, 512MiB or a number of bytes")
    exponent = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def shards_of(tensors: Tensors, max_bytes: int) -> dict[str, list[str]]:
    """File -> its tensors, in the order they are named; a tensor larger than a file has one for itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in tensors.shapes:
        if shards[-1] and size + size_of(tensors, name) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += size_of(tensors, name)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def write_weights(
    tensors: Tensors, staging: Staging, *, max_shard_bytes: int, advance: Callable[[int], object]
) -> None:
    """Write the weights of a Hugging Face folder, and the index if there are several files.

    Args:
        tensors: the whole model under its Hugging Face names.
        staging: where; files that are there stay.
        max_shard_bytes: a new file is begun beyond this.
        advance: told of bytes that were written, or were there already.

    Raises:
        OSError: the disk is full, or fails.

    """
    shards = shards_of(tensors, max_shard_bytes)
    for file, names in shards.items():
        if file in staging.finished:
            advance(sum(size_of(tensors, name) for name in names))
            continue
        write_shard(tensors, names, staging.folder / file, advance)
        staging.record(file, None)
    write_index(tensors, shards, staging.folder)


def write_index(tensors: Tensors, shards: Mapping[str, list[str]], folder: Path) -> None:
    """Write the list of which file holds which tensor; a single file needs none."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {
            "total_parameters": sum(map(math.prod, tensors.shapes.values())),
            "total_size": sum(size_of(tensors, name) for name in tensors.shapes),
        },
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def write_shard(tensors: Tensors, names: list[str], path: Path, advance: Callable[[int], object]) -> None:
    """Write one file of weights; `advance` is told of bytes that were written."""
    # the larger types first: then every number lies at a multiple of its size
    ordered = sorted(names, key=lambda name: -tensors.dtypes[name].itemsize)
    with path.open("wb") as file:
        file.write(_header(tensors, ordered))
        for name in ordered:
            for box in boxes_of(name, tensors.shapes[name], tensors.dtypes[name].itemsize):
                numbers = tensors.read(name, box.offset, box.shape).contiguous()
                file.write(memoryview(numbers.flatten().view(torch.uint8).numpy()))
                advance(box.nbytes)


def _header(tensors: Tensors, names: list[str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + size_of(tensors, name)
        entries[name] = {
            "dtype": TYPE_NAMES[tensors.dtypes[name]],
            "shape": list(tensors.shapes[name]),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
