"""The weights of this rank's chunks, as a checkpoint lays them out; no optimizer is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint import CheckpointException

from megatron_dynmix.checkpoint.tensors import Tensors, fill
from megatron_dynmix.errors import InputError
from megatron_dynmix.model.gpt import unwrap

EXTRA_STATE = "._extra_state"
"""End of the names under which modules of Transformer Engine keep what is no tensor."""
Chunks = Sequence[torch.nn.Module]


def named_chunks(chunks: Chunks) -> list[tuple[str, GPTModel]]:
    """Return the model's chunks under Megatron-LM's names: `model`, or `model0`, `model1`, ..."""
    if len(chunks) == 1:
        return [("model", unwrap(chunks[0]))]
    return [(f"model{stage}", unwrap(chunk)) for stage, chunk in enumerate(chunks)]


def model_state(chunks: Chunks) -> dict[str, Any]:
    """Return the chunks' sharded state, whose tensors are the parameters themselves."""
    # a new mapping each time: Megatron-Core keeps a layout's process groups in it
    return {key: chunk.sharded_state_dict(metadata={}) for key, chunk in named_chunks(chunks)}


def set_state(chunks: Chunks, loaded: dict[str, Any]) -> None:
    """Give the chunks what was loaded of their state."""
    for key, chunk in named_chunks(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[key], strict=False)
        wrong = [name for name in missing if not name.endswith(EXTRA_STATE)] + unexpected
        assert not wrong, f"a checkpoint that fits has all weights and no others: {wrong}"


def load_weights(chunks: Chunks, source: Path) -> None:
    """Read the weights of a checkpoint."""
    set_state(chunks, load_sharded(as_held(model_state(chunks), source), source))


def as_held(model: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return a model's sharded state as a checkpoint can have it.

    What Transformer Engine keeps beside the weights need not be there: one that is converted, or was saved
    without it, has none.
    """
    held = load_sharded_metadata(str(source))

    def is_absent(item: Any) -> bool:
        return isinstance(item, ShardedObject) and item.unique_key not in held

    return dict(extract_matching_values(model, is_absent)[1])


def fill_weights(chunks: Chunks, tensors: Tensors) -> None:
    """Read the weights from tensors that are laid out as in a checkpoint; see `fill`."""
    fill([chunk for _, chunk in named_chunks(chunks)], tensors)


def load_sharded(state: dict[str, Any], source: Path) -> dict[str, Any]:
    """Read a sharded state; `InputError` if the checkpoint is of another model."""
    try:
        return dict(dist_checkpointing.load(state, str(source)))
    except (CheckpointingException, CheckpointException, KeyError, ValueError) as error:
        raise InputError(
            f"{source} does not fit this model and optimizer: {error}; give the settings it was written with"
        ) from error
