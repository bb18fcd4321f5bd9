"""What config.json says of weights that were quantized, in the two ways that are read.

Source: `FineGrainedFP8Config` and `Mxfp4Config` of `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dynmix.errors import InputError

WORD = "quantization_config"
PLAIN_TYPES = ("float32", "float16", "bfloat16")
USUAL_BLOCK = (128, 128)


@dataclass(frozen=True)
class Quantization:
    """How weights were quantized, and what they become when they are read."""

    method: str
    """`fp8`: E4M3 with a scale for each block. `mxfp4`: E2M1 in pairs, with an exponent for each 32."""
    block: tuple[int, int]
    """Rows and columns that share a scale, for `fp8`."""
    dtype: str
    """Type of the numbers that are read, by its name in torch: that of the model."""

    def describe(self) -> str:
        """Say it in a few words."""
        return f"fp8 in blocks of {self.block[0]} x {self.block[1]}" if self.method == "fp8" else self.method


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Return how config.json says that the weights were quantized; refuse what is not read here."""
    said = config.get(WORD)
    if not said:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else None
    block = USUAL_BLOCK
    if method == "fp8":
        block = _block(said.get("weight_block_size", [*USUAL_BLOCK]))
        if said.get("activation_scheme", "dynamic") != "dynamic":
            raise InputError(
                f"{WORD} says activation_scheme {said['activation_scheme']!r}: the model was calibrated with "
                "activations of fixed scales, which are not read; take the model in bfloat16"
            )
    elif method != "mxfp4":
        raise InputError(
            f"{WORD} says {method or said!s:.60}: the weights are no plain floats and cannot be trained; "
            "read are fp8 with a scale for each block (as DeepSeek-V3) and mxfp4 (as gpt-oss); take the "
            "model in bfloat16, and a config.json without this"
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return Quantization(method, block, dtype if dtype in PLAIN_TYPES else "bfloat16")


def _block(said: Any) -> tuple[int, int]:
    """Return rows and columns that share a scale."""
    if not isinstance(said, list) or [type(size) for size in said] != [int, int] or min(said) < 1:
        raise InputError(
            f"{WORD} says fp8 and weight_block_size {said!r}; only weights with a scale for each block of so "
            "many rows and columns, as [128, 128], are read: take the model in bfloat16"
        )
    return said[0], said[1]
