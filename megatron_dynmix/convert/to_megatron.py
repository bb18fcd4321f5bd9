"""A Megatron checkpoint (`torch_dist`) written part by part, as if each part were the file of one rank.

What is written is read box by box, so memory does not grow with the model. While one part is written,
threads take the checksums of those before.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_dynmix.checkpoint.folder import Checksum, checksum
from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.convert.staging import Staging
from megatron_dynmix.convert.tensors import Box, boxes_of, grouped

PART_BYTES = 128 << 20
"""So few that threads are busy with checksums and the disk soon after the writing has begun."""
HASHING_THREADS = min(2, os.cpu_count() or 1)
PARTS_AHEAD = HASHING_THREADS + 1
"""Parts that may wait for their checksums: they are read from memory then, not from the disk."""

Advance = Callable[[int], object]


def write_checkpoint(
    tensors: Tensors, order: Callable[[Box], Any], staging: Staging, name: str, *, advance: Advance
) -> dict[str, Checksum]:
    """Write the shards and the list of them; parts that are there stay. Return each shard's checksum by name.

    `name` is the checkpoint's folder in the staging. Boxes are sorted by `order`, so that what they are made
    from is read from front to back; `advance` is told of bytes that were written, or were there already.
    """
    folder = staging.folder / name
    folder.mkdir(exist_ok=True)
    writer = FileSystemWriter(folder, sync_files=False)  # the journal syncs them, beside the writing
    boxes = sorted((box for name in tensors.shapes for box in boxes_of(tensors, name)), key=order)
    parts = grouped(boxes, lambda box: box.nbytes, PART_BYTES)
    plans = writer.prepare_global_plan([SavePlan([_item(tensors, box) for box in part]) for part in parts])
    planner = _Reading(tensors, advance)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        waiting: deque[Future[None]] = deque()
        for part, plan in zip(parts, plans, strict=True):
            file = f"{name}/{plan.storage_data.prefix}0.distcp"
            if file in staging.finished:
                advance(sum(box.nbytes for box in part))
                continue
            results = _write(writer, plan, planner)
            waiting.append(pool.submit(_finish_part, staging, file, results))
            while len(waiting) > PARTS_AHEAD:
                waiting.popleft().result()
        for future in waiting:
            future.result()
    done = [facts for file, facts in staging.finished.items() if file.startswith(f"{name}/")]
    _write_list(writer, tensors, boxes, map(_results, done))
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    torch.save({}, folder / COMMON_STATE_FNAME)
    return {facts["items"][0][2]: tuple(facts["checksum"]) for facts in done}


class _Reading(DefaultSavePlanner):
    """Reads what an item is made of when its turn to be written comes."""

    def __init__(self, tensors: Tensors, advance: Advance) -> None:
        super().__init__()
        self._tensors, self._advance = tensors, advance

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.tensor_data is not None, "every item is a tensor"
        chunk = write_item.tensor_data.chunk
        tensor = self._tensors.read(write_item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes))
        self._advance(tensor.nbytes)
        return tensor


def _item(tensors: Tensors, box: Box) -> WriteItem:
    properties = metadata.TensorProperties(dtype=tensors.dtypes[box.name])
    data = TensorWriteData(_chunk(box), properties, torch.Size(tensors.shapes[box.name]))
    return WriteItem(metadata.MetadataIndex(box.name, box.offset), WriteItemType.SHARD, tensor_data=data)


def _chunk(box: Box) -> metadata.ChunkStorageMetadata:
    return metadata.ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))


def _write(writer: FileSystemWriter, plan: SavePlan, planner: _Reading) -> list[WriteResult]:
    """Write one file, without the checksums of zip: they cost as much as the writing, and it has its own."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        return writer.write_data(plan, planner).wait()
    finally:
        set_crc32_options(before)


def _finish_part(staging: Staging, file: str, results: Sequence[WriteResult]) -> None:
    """Take the checksum of a part while it is in memory, then write its line in the journal; in a thread."""
    items = [
        (
            *(result.index.fqn, list(result.index.offset or ())),
            *(result.storage_data.relative_path, result.storage_data.offset, result.storage_data.length),
        )
        for result in results
    ]
    staging.record(file, {"checksum": checksum(staging.folder / file), "items": items})


def _results(facts: dict[str, Any]) -> list[WriteResult]:
    """Return what a finished part's line in the journal says, as its writer said it."""
    return [
        WriteResult(metadata.MetadataIndex(name, offset), length, _StorageInfo(path, start, length))
        for name, offset, path, start, length in facts["items"]
    ]


def _write_list(
    writer: FileSystemWriter, tensors: Tensors, boxes: list[Box], results: Iterable[list[WriteResult]]
) -> None:
    """Write `.metadata`: the tensors, and where their boxes are."""
    chunks: dict[str, list[metadata.ChunkStorageMetadata]] = {name: [] for name in tensors.shapes}
    for box in boxes:
        chunks[box.name].append(_chunk(box))
    listed = {
        name: metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=tensors.dtypes[name]), torch.Size(shape), chunks[name]
        )
        for name, shape in tensors.shapes.items()
    }
    writer.finish(metadata.Metadata(listed), list(results))
    found = sum(math.prod(chunk.sizes) for item in listed.values() for chunk in item.chunks)
    assert found == sum(map(math.prod, tensors.shapes.values())), "the boxes fill the tensors"
