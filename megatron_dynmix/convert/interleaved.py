"""Fused experts as gpt-oss has them, seen as those of other families, and the other way round.

There a layer's first projection is `[E, H, 2F]`, whose columns are gate and up in turn, and the second
`[E, F, H]`; here, as in the other families, `[E, 2F, H]`, gate before up, and `[E, H, F]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.families import FAMILIES
from megatron_dynmix.families.names import Shape

FIRST, SECOND, FIRST_BIAS = "experts.gate_up_proj", "experts.down_proj", "experts.gate_up_proj_bias"


def as_families(published: Tensors, hf_config: Mapping[str, object]) -> Tensors:
    """Return the tensors of a folder as the rules of families name them."""
    return Halves(Transposed(published)) if _interleaved(hf_config) else published


def as_published(tensors: Tensors, hf_config: Mapping[str, object]) -> Tensors:
    """Undo `as_families`."""
    return Transposed(InTurn(tensors)) if _interleaved(hf_config) else tensors


def _interleaved(hf_config: Mapping[str, object]) -> bool:
    family = FAMILIES.get(str(hf_config.get("model_type")))
    return family is not None and family.names.interleaved


class Transposed:
    """Tensors, the last two axes of experts' projections in each other's place."""

    def __init__(self, held: Tensors) -> None:
        self._held, self.dtypes = held, held.dtypes
        self.shapes = {name: _swapped(name, shape) for name, shape in held.shapes.items()}

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of a tensor."""
        tensor = self._held.read(name, _swapped(name, offset), _swapped(name, shape))
        return tensor.transpose(1, 2) if name.endswith((FIRST, SECOND)) else tensor


def _swapped(name: str, sizes: Shape) -> Shape:
    if not name.endswith((FIRST, SECOND)):
        return sizes
    experts, one, other = sizes
    return experts, other, one


class Halves:
    """Tensors, of whose first projections all rows of gate come before those of up."""

    def __init__(self, held: Tensors) -> None:
        self._held, self.shapes, self.dtypes = held, held.shapes, held.dtypes

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of a tensor."""
        if not name.endswith((FIRST, FIRST_BIAS)):
            return self._held.read(name, offset, shape)
        (expert, row, *rest), (experts, rows, *width) = offset, shape
        half = self.shapes[name][1] // 2
        parts = []
        for which in (0, 1):
            first, end = max(row - which * half, 0), min(row + rows - which * half, half)
            if first < end:
                place, size = (expert, 2 * first, *rest), (experts, 2 * (end - first), *width)
                parts.append(self._held.read(name, place, size)[:, which::2])
        return torch.cat(parts, dim=1)


class InTurn:
    """Tensors, of whose first projections rows of gate and up come in turn: `Halves` undone."""

    def __init__(self, held: Tensors) -> None:
        self._held, self.shapes, self.dtypes = held, held.shapes, held.dtypes

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of a tensor."""
        if not name.endswith((FIRST, FIRST_BIAS)):
            return self._held.read(name, offset, shape)
        (expert, row, *rest), (experts, rows, *width) = offset, shape
        half = self.shapes[name][1] // 2
        result = torch.empty(shape, dtype=self.dtypes[name])
        for which in (0, 1):
            skipped = (row + which) % 2  # rows of the box before the first of these
            first, count = (row + skipped) // 2, (rows - skipped + 1) // 2
            if count:
                place, size = (expert, which * half + first, *rest), (experts, count, *width)
                result[:, skipped::2] = self._held.read(name, place, size)
        return result
