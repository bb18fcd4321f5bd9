"""Whether two models hold the same numbers: checksums of values, whatever layout they lie in."""

from __future__ import annotations

import math
import zlib
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.convert.logits import LogitsVerdict
from megatron_dynmix.convert.tensors import boxes_of, read_bytes, size_of, total_size
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

    It is for people: whether values differ is found by comparing them.
    """
    written_sum: str
    differing: tuple[str, ...]
    """Hugging Face tensors whose values are not equal."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a model's tensors in a conversion: so many were read, and so many were written.

    Those left out are the `computed` and `predicting` ones of `HuggingFaceFolder`.
    """

    folder: Path
    """Where what was written lies: under its final name only if nothing is wrong."""
    read: int
    written: int
    dtype: str
    """Type of most of the numbers that were written."""
    computed: tuple[str, ...] = ()
    predicting: tuple[str, ...] = ()
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


def compare_values(read: Tensors, written: Tensors, weight_map: WeightMap) -> list[GroupVerdict]:
    """Read both models to the end, as Hugging Face tensors, and compare them bit for bit."""
    groups: dict[str, list[str]] = {}
    found: dict[str, tuple[int, int, bool]] = {}
    with ThreadPoolExecutor(1) as pool, ProgressBar("comparing", total_size(written)) as progress:
        for name in weight_map.hf_shapes:
            groups.setdefault(weight_map.group_of(name), []).append(name)
            found[name] = _compare(pool, read, written, name)
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
            differing=tuple(name for name in names if not found[name][2]),
        )
        for group, names in groups.items()
    ]


def _compare(pool: Executor, read: Tensors, written: Tensors, name: str) -> tuple[int, int, bool]:
    """Compare a tensor as bytes, so that NaN equals itself; return its CRC-32 on either side first."""
    read_sum, written_sum, equal = 0, 0, True
    for box in boxes_of(written, name):
        reading = pool.submit(read_bytes, read, box)
        two = read_bytes(written, box)
        one = reading.result()
        equal = equal and np.array_equal(one, two)
        read_sum, written_sum = zlib.crc32(one.data, read_sum), zlib.crc32(two.data, written_sum)
    return read_sum, written_sum, equal
