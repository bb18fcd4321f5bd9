"""A model small enough to be run: all layers of a large one, or the first, a middle and the last.

The same layers are taken on both sides, renumbered, so that embedding, layers and output layer of a model
that does not fit in memory can still be compared. Axes: L layers.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_dynmix.checkpoint.slices import own_slices
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.megatron import STAGE_SETTINGS, moe_layers, transformer_config
from megatron_dynmix.config.tree import ModelConfig
from megatron_dynmix.convert.tensors import Tensors
from megatron_dynmix.model.gpt import build_gpt

HF_LAYER = re.compile(r"(?P<before>(?:.*\.)?layers\.)(?P<layer>\d+)(?P<after>\..*)")
STACKED, APART = "decoder.layers.", re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<name>.*)")
FLOAT_BYTES = 4
HEADROOM = 2.25
"""Memory that a model takes while it is loaded and run, of its weights in float32; measured: 1.9 to 2.2."""
NOT_LEARNT: Mapping[str, Any] = {
    # nothing of what a model answers follows from these but whether tokens are dropped or noise is added
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_input_jitter_eps": None,
    # these want kernels that not every machine has, or precisions that are not compared here
    "moe_grouped_gemm": False,
    "moe_use_legacy_grouped_gemm": False,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_fusion": False,
    "apply_rope_fusion": False,
    "recompute_granularity": None,
    "fp8": None,
    "fp4": None,
    # every weight is read
    "perform_initialization": False,
}
"""Settings that say how a model is trained, not what it is, and what they are for a comparison."""


def choose_layers(shapes: Mapping[str, tuple[int, ...]], *, limit: int, memory: int) -> tuple[int, ...]:
    """Which layers are run.

    Args:
        shapes: of the Hugging Face tensors, by name.
        limit: parameters of a model that is run as a whole.
        memory: bytes that are free.

    Returns:
        Their numbers, from 0: all of them; of a model with more parameters the first, the middle and the
        last; fewer of those if there is no memory for them; none if there is not even for one.

    """
    fixed, layer_L = 0, dict[int, int]()
    for name, shape in shapes.items():
        if match := HF_LAYER.fullmatch(name):
            number = int(match["layer"])
            layer_L[number] = layer_L.get(number, 0) + math.prod(shape)
        else:
            fixed += math.prod(shape)
    every, last = tuple(sorted(layer_L)), max(layer_L)
    candidates = [tuple(sorted({0, last // 2, last})), tuple(sorted({0, last})), (last,)]
    if fixed + sum(layer_L.values()) <= limit:
        candidates.insert(0, every)
    for layers in candidates:
        parameters = fixed + sum(layer_L[layer] for layer in layers)
        if parameters * FLOAT_BYTES * HEADROOM <= memory:
            return layers
    return ()


def cut_config(config: Any, layers: Sequence[int]) -> Any:
    """Settings of a `transformers` model that has some of another's layers.

    Args:
        config: a `PretrainedConfig`.
        layers: numbers of the layers that it keeps.

    """
    cut, total = copy.deepcopy(config), config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total and name.endswith("layer_types"):
            setattr(cut, name, [value[layer] for layer in layers])
    step = getattr(config, "decoder_sparse_step", None)
    if step is not None:
        without = set(getattr(config, "mlp_only_layers", None) or ())
        dense = [layer in without or (layer + 1) % step != 0 for layer in layers]
        cut.mlp_only_layers = [number for number, is_dense in enumerate(dense) if is_dense]
        cut.decoder_sparse_step = 1
    if getattr(config, "first_k_dense_replace", None) is not None:
        cut.first_k_dense_replace = sum(layer < config.first_k_dense_replace for layer in layers)
    cut.num_hidden_layers = len(layers)
    return cut


def cut_weights(folder: Tensors, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """The weights of those layers, renumbered, and of what is outside all layers."""
    weights = {}
    for name, shape in folder.shapes.items():
        new_name = name
        if match := HF_LAYER.fullmatch(name):
            layer = int(match["layer"])
            if layer not in layers:
                continue
            new_name = f"{match['before']}{layers.index(layer)}{match['after']}"
        weights[new_name] = folder.read(name, (0,) * len(shape), shape)
    return weights


def cut_model(model: ModelConfig, layers: Sequence[int]) -> RunConfig:
    """Our settings of the model with those layers: on one rank, in float32, its vocabulary not padded."""
    settings = {name: value for name, value in model.megatron.items() if name not in STAGE_SETTINGS}
    frequency = settings.get("moe_layer_freq", 1)
    if frequency != 1:  # layers that differ; a list keeps the names that such layers have in checkpoints
        moe = moe_layers(transformer_config(RunConfig(model=dataclasses.replace(model, megatron=settings))))
        settings["moe_layer_freq"] = [int(layer in moe) for layer in layers]
    settings.update({name: value for name, value in NOT_LEARNT.items() if name in settings})
    settings.update(num_layers=len(layers), perform_initialization=False)
    return RunConfig(model=dataclasses.replace(model, make_vocab_size_divisible_by=1, megatron=settings))


def build_cut(model: ModelConfig, checkpoint: Tensors, layers: Sequence[int]) -> GPTModel:
    """Our GPT with some of a checkpoint's layers, in evaluation mode.

    Process groups must be there, for one rank. Transformer Engine is not used: it multiplies matrices of
    float32 in TF32.

    Raises:
        KeyError: a tensor that the model has and the checkpoint has not.
        ValueError: one that is too small.

    """
    config = cut_model(model, layers)
    gpt = build_gpt(config, transformer_config(config), transformer_engine=False)
    with torch.no_grad():
        for tensor in own_slices([gpt]):
            tensor.data.copy_(_read(checkpoint, tensor, layers))
    return gpt.eval()


def _read(checkpoint: Tensors, tensor: ShardedTensor, layers: Sequence[int]) -> torch.Tensor:
    name, offset = tensor.key, tensor.global_offset
    if match := APART.fullmatch(name):
        name = f"{STACKED}{layers[int(match['layer'])]}.{match['name']}"
    elif name.startswith(STACKED):
        offset = (layers[offset[0]], *offset[1:])
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    there = checkpoint.shapes[name]
    if any(start + size > length for start, size, length in zip(offset, shape, there, strict=True)):
        raise ValueError(f"{name} is {list(there)}, too small for {list(shape)} at {list(offset)}")
    return checkpoint.read(name, offset, shape).reshape(tensor.local_shape)
