"""Tiny Hugging Face models of odd sizes, made once in a session."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_dynmix.convert.tensors import box

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
ODD = {
    "vocab_size": 131,
    "hidden_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""3 KV groups of 2 heads; a vocabulary that no multiple of 128 fits; widths that are no powers of two."""
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 14, "num_local_experts": 6, "head_dim": 10},
    "qwen2_moe": {
        "hidden_size": 36,
        "intermediate_size": 22,
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 18,
        "num_experts": 6,
    },
    "qwen3_moe": {
        "intermediate_size": 22,
        "moe_intermediate_size": 14,
        "num_experts": 6,
        "head_dim": 10,
        "norm_topk_prob": True,
    },
    "olmoe": {"hidden_size": 36, "intermediate_size": 14, "num_experts": 6},
    "gpt_oss": {
        "intermediate_size": 14,
        "num_local_experts": 6,
        "head_dim": 10,
        "sliding_window": 5,
        "swiglu_limit": 0.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
            "rope_theta": 50.0,
        },
    },
}
MIXED = {"num_hidden_layers": 3, "mlp_only_layers": [0]}
"""Qwen with a dense layer before the MoE layers."""


class InMemory:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Read a box as a view."""
        return self.tensors[name][box(offset, shape)]


def tiny_config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    """Configuration of a tiny model, with changes to it."""
    return transformers.AutoConfig.for_model(family, **{**ODD, **SIZES[family], **changes})


def tiny_model(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A tiny model with random weights: biases and norms too, which are else born as zeros and ones."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = transformers.AutoModelForCausalLM.from_config(
            tiny_config(family, **changes), dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.2 if parameter.ndim > 1 else 0.1
                center = 1.0 if "norm" in name else 0.0
                parameter.copy_(center + scale * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny-models-")  # removed when the session ends


@functools.cache
def _folder(family: str, fused: bool, shard: str, dtype: str, changes: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=_scratch().name))
    model = tiny_model(family, **json.loads(changes)).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=not fused)
    return folder


def tiny_folder(
    family: str, *, fused: bool = False, shard: str = "20KB", dtype: str = "float32", **changes: Any
) -> Path:
    """Folder of a tiny model, in several files; made once in a session, so never write to it.

    Args:
        family: one of `FAMILIES`.
        fused: with the experts of a layer in one tensor, as transformers 5 has them in memory; otherwise a
            tensor for each, as published models have them.
        shard: longest file.
        dtype: type of the weights, by its name in torch.
        changes: settings of the model's configuration.

    """
    return _folder(family, fused, shard, dtype, json.dumps(changes, sort_keys=True))
