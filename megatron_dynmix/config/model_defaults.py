"""What settings of the model are where nothing is said."""

from __future__ import annotations

from typing import Any

from megatron_dynmix.config.megatron_fields import megatron_fields
from megatron_dynmix.config.run_config import ModelConfig


def model_defaults() -> dict[str, Any]:
    """Return Megatron-Core's defaults, and ours."""
    megatron = {name: field.default for name, field in megatron_fields()["TransformerConfig"].items()}
    return {**megatron, **ModelConfig(preset=None).flat()}
