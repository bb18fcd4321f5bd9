"""What differs between the releases of Megatron-Core that this package runs on, 0.16.1 to 0.19; nowhere else.

What is there is asked, not which release it is. The settings of each release are data:
`config/megatron_fields`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import torch


def expect_deprecations() -> None:
    """Drop the lines of later versions that say what they will replace of what is used here."""
    for module in ("models.gpt.gpt_model", "dist_checkpointing.strategies.common"):
        _drop(module, "deprecated")
    _drop("dist_checkpointing.strategies.torch", "async save is deprecated")
    _drop("distributed.distributed_data_parallel", "full_param_layout not provided")  # it makes its own


def _drop(module: str, words: str) -> None:
    logging.getLogger(f"megatron.core.{module}").addFilter(
        lambda record: words not in record.getMessage().lower()
    )


def recompute_without_compiler() -> None:
    """Have recomputed outputs copied into their place, as 0.16 does.

    Later versions compile a C++ extension for it when it is first needed.
    """
    from megatron.core.tensor_parallel import random

    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: _copy_storage


def _copy_storage(place: torch.Tensor, recomputed: torch.Tensor) -> None:
    storage = recomputed.untyped_storage()
    place.untyped_storage().resize_(storage.size())
    place.untyped_storage().copy_(storage)


def keep_query_projection() -> None:
    """Have queries without a latent projected as the spec says; 0.19 puts a norm before that projection.

    No model has a norm there, and 0.16 to 0.18 build none.
    """
    try:
        from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver as Resolver
    except ImportError:
        return
    choose = Resolver._mla_fused_linear_or_default
    if hasattr(choose, "__wrapped__"):
        return

    @functools.wraps(choose)
    def chosen(self: Any, given: Any, name: str) -> Any:
        return given if name == "linear_q_proj" else choose(self, given, name)

    Resolver._mla_fused_linear_or_default = chosen


def moe_parts(mlp: Any) -> Any | None:
    """Return the submodules of a layer's MLP spec if that is an MoE; None for a dense one.

    A `ModuleSpec` before 0.18, a partial of the class from then on.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    is_partial = isinstance(mlp, functools.partial)
    if (mlp.func if is_partial else mlp.module) is not MoELayer:
        return None
    return mlp.keywords["submodules"] if is_partial else mlp.submodules


def request_shards(writer: Any, sharded: dict[str, Any], folder: Path) -> Any:
    """Return the request of a `TorchDistSaveShardedStrategy` to write shards, by Megatron-Core's own writer.

    From 0.17 on another package's is the default.
    """
    asked = inspect.signature(writer.async_save).parameters
    return writer.async_save(
        sharded, folder, **({"async_strategy": "mcore"} if "async_strategy" in asked else {})
    )
