"""The sources of a run, known by their names and by what their rows follow from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_dynmix.files import sha256

Prints = Mapping[str, Sequence[str]]
"""Source name -> what its rows follow from: checksums of its files, tokenizer, template."""


def fingerprint(parts: Sequence[str]) -> str:
    """Return one short number for what a source's rows follow from."""
    return sha256(list(parts))[:16]


@dataclass(frozen=True, kw_only=True)
class SourceSet:
    """The sources between two changes of data, in the order of their dataset_id."""

    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    """Equal where the rows are."""
    sizes: tuple[int, ...]
    """Rows."""

    @classmethod
    def of(cls, prints: Prints, sizes: Sequence[int]) -> SourceSet:
        """Return sources of so many rows."""
        return cls(
            names=tuple(prints),
            fingerprints=tuple(map(fingerprint, prints.values())),
            sizes=tuple(sizes),
        )
