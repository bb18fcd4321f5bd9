"""Tensors of a folder that are no part of the model: layers for multi-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREDICTION = "num_nextn_predict_layers"
"""Setting of config.json: layers for multi-token prediction, which follow the model's own."""


def prediction_layers(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the names of tensors for multi-token prediction begin with; only DeepSeek-V3 has any.

    They serve to decode faster and are no part of the model, for `transformers` neither.
    """
    count = hf_config.get(PREDICTION) or 0 if hf_config.get("model_type") == "deepseek_v3" else 0
    first = hf_config.get("num_hidden_layers", 0)
    return tuple(f"model.layers.{layer}." for layer in range(first, first + count))
