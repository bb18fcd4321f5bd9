"""Whether two models hold the same numbers: checksums of values, whatever layout they lie in."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.convert.logits import LogitsVerdict
from megatron_dynmix.convert.tensors import as_bytes, boxes_of, size_of
from megatron_dynmix.convert.weight_map import WeightMap
from megatron_dynmix.data.prepare.progress import ProgressBar
from megatron_dynmix.files import sha256


@dataclass(frozen=True, kw_only=True)
class GroupVerdict:
    """The tensors of one kind, in what was read and in what was written."""

    group: str
    tensors: int
    numbers: int
    nbytes: int
    read_sum: str
    """SHA-256, in hex, over lines of name and CRC-32 of its Hugging Face tensors, sorted by name.

    It is for people, and of numbers as they are cast: whether values differ is found by comparing them.
    """
    written_sum: str
    differing: tuple[str, ...]
    """Hugging Face tensors whose values are not equal, but for what a cast may round off."""
    rounded: float
    """Largest part of a number that a cast has rounded off; 0 without one."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a model's tensors in a conversion: so many were read, and so many were written.

    Beside them are the `computed` ones of `HuggingFaceFolder`, which are left out, and those kept `aside`.
    """

    folder: Path
    """Where what was written lies: under its final name only if nothing is wrong."""
    read: int
    written: int
    dtype: str
    """Type of most of the numbers that were written."""
    computed: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    padding: str = "none"
    """What became of the rows that pad the vocabulary."""
    groups: list[GroupVerdict] | None = None
    """Values read back and compared; None, as `logits`, if that was not wanted."""
    logits: LogitsVerdict | None = None
    notes: tuple[str, ...] = ()
    """What a reader must know besides."""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        logits = self.logits is None or self.logits.passed
        return logits and not any(group.differing for group in self.groups or ())


class _Compared(NamedTuple):
    """One tensor on both sides: its CRC-32, whether all is well, and what a cast has rounded off."""

    read_sum: int
    written_sum: int
    equal: bool
    rounded: float


def compare_values(
    read: Tensors, written: Tensors, weight_map: WeightMap, dtype: torch.dtype | None = None
) -> list[GroupVerdict]:
    """Read both models to the end, as Hugging Face tensors, and compare them bit for bit.

    If what was `read` is to be cast to `dtype`, a number may differ by the rounding to that type, and only in
    tensors that are cast: those which stay float32 must be equal.
    """

    def wanted(name: str) -> torch.dtype:
        if dtype is None:
            return read.dtypes[name]
        return torch.float32 if name in weight_map.float32 else dtype

    groups: dict[str, list[str]] = {}
    for name in weight_map.hf_shapes:
        groups.setdefault(weight_map.group_of(name), []).append(name)
    return _compare_groups(read, written, groups, wanted)


def compare_kept(read: Tensors, written: Tensors) -> GroupVerdict:
    """Compare what is kept aside bit for bit, by its names in a Hugging Face folder."""
    assert dict(read.shapes) == dict(written.shapes), "what is kept aside has the same names and shapes"
    return _compare_groups(read, written, {"kept aside": [*read.shapes]}, read.dtypes.__getitem__)[0]


def _compare_groups(
    read: Tensors,
    written: Tensors,
    groups: Mapping[str, list[str]],
    wanted: Callable[[str], torch.dtype],
) -> list[GroupVerdict]:
    """Compare tensors by group, each with what was read of it in the type that is `wanted`."""
    found: dict[str, _Compared] = {}
    every = [name for names in groups.values() for name in names]
    size = sum(size_of(written, name) for name in every)
    with ThreadPoolExecutor(1) as pool, ProgressBar("comparing", size) as progress:
        for name in every:
            found[name] = _compare(pool, read, written, name, wanted(name))
            progress.advance(size_of(written, name))

    def combined(names: list[str], side: int) -> str:
        return sha256("".join(f"{name} {found[name][side]:08x}\n" for name in sorted(names)))

    return [
        GroupVerdict(
            group=group,
            tensors=len(names),
            numbers=sum(math.prod(written.shapes[name]) for name in names),
            nbytes=sum(size_of(written, name) for name in names),
            read_sum=combined(names, 0),
            written_sum=combined(names, 1),
            differing=tuple(name for name in names if not found[name].equal),
            rounded=max(found[name].rounded for name in names),
        )
        for group, names in groups.items()
    ]


def _compare(pool: Executor, read: Tensors, written: Tensors, name: str, wanted: torch.dtype) -> _Compared:
    """Compare a tensor with what was read of it, cast to the type that is `wanted`.

    If that holds every number of the other, bytes are compared, so that NaN equals itself.
    """
    exact = torch.promote_types(read.dtypes[name], wanted) == wanted
    read_sum, written_sum, rounded = 0, 0, 0.0
    equal = written.dtypes[name] == wanted
    for box in boxes_of(written, name):
        reading = pool.submit(read.read, name, box.offset, box.shape)
        two = written.read(name, box.offset, box.shape)
        one = reading.result()
        before, after = as_bytes(one.to(wanted)), as_bytes(two)
        if exact:
            equal = equal and np.array_equal(before, after)
        else:
            lost, within = _rounding(one.float(), two.float(), torch.finfo(wanted))
            equal, rounded = equal and within, max(rounded, lost)
        read_sum, written_sum = zlib.crc32(before.data, read_sum), zlib.crc32(after.data, written_sum)
    return _Compared(read_sum, written_sum, equal, rounded)


def _rounding(one: torch.Tensor, two: torch.Tensor, kind: torch.finfo) -> tuple[float, bool]:
    """Return the largest part of a number that was lost, and whether none lost more than rounding takes.

    That is half of the last digit, which is a part of the number itself, or of the smallest number there is.
    """
    differ = (one != two) & ~(one.isnan() & two.isnan())
    one, two = one[differ], two[differ]
    lost = (two - one).abs()
    allowed = kind.eps / 2 * one.abs().clamp(min=kind.smallest_normal)
    return float((lost / one.abs()).max()) if len(lost) else 0.0, bool((lost <= allowed).all())
