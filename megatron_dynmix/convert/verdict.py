"""Whether two models hold the same numbers: checksums of values, whatever layout they lie in."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.convert.logits import LogitsVerdict
from megatron_dynmix.convert.tensors import boxes_of, read_bytes, size_of
from megatron_dynmix.convert.weight_map import WeightMap
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

    It is for people: whether values differ is found by comparing them.
    """
    written_sum: str
    differing: tuple[str, ...]
    """Hugging Face tensors whose values are not equal."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a model's tensors in a conversion."""

    folder: Path
    """Where what was written lies: under its final name only if nothing is wrong."""
    read: int
    """Tensors that were read."""
    written: int
    """Tensors that were written."""
    dtype: str
    """Type of most of the numbers that were written."""
    computed: tuple[str, ...] = ()
    """Tensors that are left out, because nothing in them was learned."""
    predicting: tuple[str, ...] = ()
    """Tensors of layers for multi-token prediction: learned, but no part of the model, and not converted."""
    padding: str = "none"
    """What became of the rows that pad the vocabulary."""
    groups: list[GroupVerdict] | None = None
    """Values read back and compared; None if that was not wanted."""
    logits: LogitsVerdict | None = None
    """What the comparison of logits says; None if it was not wanted."""
    notes: tuple[str, ...] = ()
    """What a reader must know besides."""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        logits = self.logits is None or self.logits.passed
        return logits and not any(group.differing for group in self.groups or ())


def compare_values(
    read: Tensors, written: Tensors, weight_map: WeightMap, advance: Callable[[int], object]
) -> list[GroupVerdict]:
    """Read both models to the end, as Hugging Face tensors, and compare them bit for bit.

    The verdicts are in the order of the map; `advance` is told of bytes that were compared.
    """
    found: dict[str, dict[str, _Compared]] = {}
    with ThreadPoolExecutor(1) as pool:
        for name in weight_map.hf_shapes:
            kind = found.setdefault(weight_map.group_of(name), {})
            kind[name] = _compare(pool, read, written, name)
            advance(size_of(written, name))
    return [
        GroupVerdict(
            group=group,
            tensors=len(kind),
            numbers=sum(math.prod(written.shapes[name]) for name in kind),
            nbytes=sum(size_of(written, name) for name in kind),
            read_sum=_combined({name: one.read_sum for name, one in kind.items()}),
            written_sum=_combined({name: one.written_sum for name, one in kind.items()}),
            differing=tuple(name for name, one in kind.items() if not one.equal),
        )
        for group, kind in found.items()
    ]


class _Compared(NamedTuple):
    read_sum: int
    written_sum: int
    equal: bool


def _compare(pool: Executor, read: Tensors, written: Tensors, name: str) -> _Compared:
    """Compare a tensor as bytes, so that NaN equals itself; return its CRC-32 on either side too."""
    sums, equal = (0, 0), True
    for box in boxes_of(written, name):
        reading = pool.submit(read_bytes, read, box)
        two = read_bytes(written, box)
        one = reading.result()
        equal = equal and np.array_equal(one, two)
        sums = zlib.crc32(one.data, sums[0]), zlib.crc32(two.data, sums[1])
    return _Compared(*sums, equal)


def _combined(sums: dict[str, int]) -> str:
    lines = "".join(f"{name} {checksum:08x}\n" for name, checksum in sorted(sums.items()))
    return sha256(lines)
