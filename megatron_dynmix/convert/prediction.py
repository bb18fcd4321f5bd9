"""Tensors of a folder that are no part of the model: layers for multi-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dynmix.families import FAMILIES

PREDICTION = "num_nextn_predict_layers"
"""Setting of config.json: layers for multi-token prediction, which follow the model's own."""


def prediction_layers(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the names of tensors for multi-token prediction begin with; most families have none.

    They serve to decode faster and are no part of the model, for `transformers` neither.
    """
    family = FAMILIES.get(str(hf_config.get("model_type")))
    count = hf_config.get(PREDICTION) or 0 if family is not None and family.names.predicting else 0
    first = hf_config.get("num_hidden_layers", 0)
    return tuple(f"model.layers.{layer}." for layer in range(first, first + count))
