"""Tensors laid out as in a checkpoint, and a rank's own slices of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_dynmix.job.agreement import together


class Tensors(Protocol):
    """Named tensors of which boxes can be read: a folder of safetensors, a checkpoint, a model's state."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Name -> type of its numbers."""

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Read a box of a tensor, as a CPU tensor of exactly `shape`; no more than it is read from disk."""


def own_slices(chunks: Iterable[GPTModel]) -> Iterator[ShardedTensor]:
    """Yield what this rank's chunks hold of each tensor: `data` is a view of the parameter."""
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata={})  # Megatron-Core writes into it
        apply_factories(state)
        yield from (item for item in nested_values(state) if isinstance(item, ShardedTensor))


def fill(chunks: Sequence[GPTModel], tensors: Tensors) -> None:
    """Give every parameter and buffer its numbers, in its own precision; all ranks come here.

    Of `tensors`, the whole model by the names of a checkpoint, only this rank's slices are read. Raise
    `RankFailure` on every rank if one cannot.
    """
    with together():
        filled = _fill_own(chunks, tensors)
    every: list[set[str]] = [set()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, filled)
    left = tensors.shapes.keys() - set().union(*every)
    assert not left, f"no rank has a slice of {sorted(left)}"


@torch.no_grad()
def _fill_own(chunks: Sequence[GPTModel], tensors: Tensors) -> set[str]:
    """Fill one slice at a time; return the names of the tensors that this rank has a slice of."""
    held = (tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers()))
    storages = {tensor.untyped_storage().data_ptr() for tensor in held}
    filled = set()
    for own in own_slices(chunks):
        assert own.data is not None and own.data.untyped_storage().data_ptr() in storages, (
            f"{own.key} is a copy: what is written to it is lost"
        )
        assert tensors.shapes.get(own.key) == own.global_shape, (
            f"{own.key} is {own.global_shape} here and {tensors.shapes.get(own.key)} there"
        )
        shape = (1,) * own.prepend_axis_num + own.local_shape
        own.data.copy_(tensors.read(own.key, own.global_offset, shape).reshape(own.local_shape))
        filled.add(own.key)
    return filled
