"""Quantized weights, read as the plain floats that they stand for: of each, only what was asked for.

fp8: `NAME` is E4M3 `[..., N, K]`, `NAME_scale_inv` is `[..., N / rows, K / columns]`, rounded up: a number is
the product of both in float32, then rounded (DeepSeek-V3 technical report, 3.3.2).
mxfp4: `NAME_blocks` is `[..., N, K / 32, 16]` bytes of two E2M1 numbers, the lower half first, `NAME_scales`
is `[..., N, K / 32]`, their exponents, biased by 127 (OCP Microscaling Formats 1.0, 6.3); `NAME` is then
`[..., K, N]`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_dynmix.config.quantization import WORD, Quantization
from megatron_dynmix.convert.weight_files import DTYPES, TYPE_NAMES, WeightFiles, remedy
from megatron_dynmix.errors import InputError
from megatron_dynmix.families.names import Shape

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
E2M1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0))
"""The numbers of four bits."""
PAIRS = torch.stack((E2M1.repeat(16), E2M1.repeat_interleave(16)), dim=-1)
"""What a byte stands for in mxfp4, `[256, 2]`."""
MX_BLOCK, BIAS = 32, 127
EIGHT_BITS = torch.float8_e4m3fn
ROWS_AT_ONCE = 128
E4M3 = torch.arange(256, dtype=torch.uint8).view(EIGHT_BITS).float()
"""What a byte stands for in fp8."""
SCALE_TYPES = (*DTYPES.values(), torch.float8_e8m0fnu)

Read = Callable[[str, Shape, Shape], torch.Tensor]


class Dequantized:
    """The tensors of files, plain floats in the place of what was quantized."""

    def __init__(self, files: WeightFiles, quantization: Quantization | None) -> None:
        """Find out what is quantized, by types and names; refuse what does not go together."""
        self._files, self._quantization = files, quantization
        self.shapes: dict[str, Shape] = dict(files.shapes)
        self.dtypes: dict[str, torch.dtype] = dict(files.dtypes)
        self.file_of: dict[str, Path] = dict(files.file_of)
        self._readers: dict[str, Read] = {}
        if quantization is None:
            return
        take = self._take_fp8 if quantization.method == "fp8" else self._take_mxfp4
        for name in files.shapes:
            take(name, quantization)
        if not self._readers:
            raise InputError(
                f"{WORD} says {quantization.describe()}, but no tensor is; take it out of config.json, or "
                "fetch the weights again"
            )

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of a tensor."""
        return self._readers.get(name, self._files.read)(name, offset, shape)

    def _plain(self, name: str, shape: Shape, held: tuple[str, str], dtype: str, read: Read) -> None:
        """Put a tensor of plain floats in the place of the two that it is held in."""
        file = self._files.file_of[held[0]]
        for gone in held:
            del self.shapes[gone], self.dtypes[gone], self.file_of[gone]
        self.shapes[name], self.dtypes[name], self.file_of[name] = shape, getattr(torch, dtype), file
        self._readers[name] = read

    def _take_fp8(self, name: str, how: Quantization) -> None:
        files = self._files
        if name.endswith(SCALE):
            weight = name.removesuffix(SCALE)
            if files.dtypes.get(weight) != EIGHT_BITS:
                raise InputError(
                    f"{files.file_of[name]} holds {name}, but {weight} is not fp8 there; fetch the folder "
                    "again"
                )
        if files.dtypes[name] != EIGHT_BITS:
            return
        shape, scale = files.shapes[name], name + SCALE
        if scale not in files.shapes:
            raise InputError(
                f"{name} in {files.file_of[name]} is of type F8_E4M3, a quantized one, and {scale} is not "
                "there; fetch the folder again"
            )
        grid = tuple(-(-size // block) for size, block in zip(shape[-2:], how.block, strict=False))
        if len(shape) < 2 or files.shapes[scale] != (*shape[:-2], *grid):
            raise InputError(
                f"{scale} is {list(files.shapes[scale])} in {files.file_of[scale]}, but {name} is "
                f"{list(shape)}, in blocks of {list(how.block)}: it must be {[*shape[:-2], *grid]}; they are "
                "not of one model"
            )
        if files.dtypes[scale] not in SCALE_TYPES:
            raise InputError(
                f"{scale} in {files.file_of[scale]} is of type {TYPE_NAMES[files.dtypes[scale]]}, and a "
                f"scale is one of {', '.join(TYPE_NAMES[dtype] for dtype in SCALE_TYPES)}"
            )
        self._plain(name, shape, (name, scale), how.dtype, self._read_fp8)

    def _read_fp8(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box, some rows at a time: what is made on the way stays in the processor's cache."""
        result = torch.empty(shape, dtype=self.dtypes[name])
        *before, rows, columns = shape
        for first in range(0, rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, rows - first)
            place = (*offset[:-2], offset[-2] + first, offset[-1])
            part = self._fp8_rows(name, place, (*before, count, columns))
            result[..., first : first + count, :] = part
        return result

    def _fp8_rows(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box as float32."""
        assert self._quantization is not None, "or nothing is quantized"
        first, size, within = [*offset], [*shape], []
        for axis, block in zip((-2, -1), self._quantization.block, strict=True):
            end = -(-(offset[axis] + shape[axis]) // block)
            first[axis] = offset[axis] // block
            size[axis] = end - first[axis]
            index = torch.arange(offset[axis], offset[axis] + shape[axis])
            within.append(index.div(block, rounding_mode="floor") - first[axis])
        scale = self._files.read(name + SCALE, tuple(first), tuple(size)).float()
        scale = scale.index_select(-2, within[0]).index_select(-1, within[1])
        return _looked_up(E4M3, self._files.read(name, offset, shape).view(torch.uint8)).mul_(scale)

    def _take_mxfp4(self, name: str, how: Quantization) -> None:
        files = self._files
        for one, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
            if name.endswith(one) and (partner := name.removesuffix(one) + other) not in files.shapes:
                raise InputError(
                    f"{files.file_of[name]} holds {name}, and {partner} is not there; fetch the folder again"
                )
        if not name.endswith(BLOCKS):
            return
        plain = name.removesuffix(BLOCKS)
        shape, scales = files.shapes[name], plain + SCALES
        bytes_only = {files.dtypes[name], files.dtypes[scales]} == {torch.uint8}
        pairs = MX_BLOCK // 2
        if shape[2:][-1:] != (pairs,) or files.shapes[scales] != shape[:-1] or not bytes_only:
            raise InputError(
                f"{name} is {list(shape)} and {scales} {list(files.shapes[scales])} in "
                f"{files.file_of[name]}; mxfp4 is bytes [..., {pairs}], with an exponent, a byte too, for "
                "each row of them; fetch them again"
            )
        *before, rows, groups = shape[:-1]
        full = (*before, groups * MX_BLOCK, rows)
        self._plain(plain, full, (name, scales), how.dtype, self._read_mxfp4)

    def _read_mxfp4(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read `[..., K, N]`, which lies there as `[..., N, K]`."""
        (*before, column, row), (*some, columns, rows) = offset, shape
        first = column // MX_BLOCK
        groups = -(-(column + columns) // MX_BLOCK) - first
        place, size = (*before, row, first), (*some, rows, groups)
        numbers = _looked_up(PAIRS, self._files.read(name + BLOCKS, (*place, 0), (*size, MX_BLOCK // 2)))
        exponents = self._files.read(name + SCALES, place, size).int() - BIAS
        scale = torch.ldexp(torch.ones(size), exponents)
        values = numbers.mul_(scale[..., None, None]).flatten(-3)
        within = column - first * MX_BLOCK
        wanted = values[..., within : within + columns].to(self.dtypes[name])
        return wanted.transpose(-1, -2)


def _looked_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the row of a table for each byte: several times as fast as to convert or to index."""
    return table.index_select(0, codes.flatten().int()).view(*codes.shape, *table.shape[1:])


def refuse_types(tensors: Dequantized, names: list[str]) -> None:
    """Refuse tensors of the model that are no plain floats, and of which config.json says nothing."""
    for name in names:
        if tensors.dtypes[name] not in DTYPES.values():
            kind = TYPE_NAMES[tensors.dtypes[name]]
            raise InputError(f"{name} in {tensors.file_of[name]} is of type {kind}; {remedy()}")
