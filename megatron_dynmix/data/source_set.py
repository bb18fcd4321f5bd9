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


def differences(before: Prints, after: Prints) -> list[str]:
    """Say what changed from one set of sources to another, a clause each; nothing if they are the same."""
    removed, added = [n for n in before if n not in after], [n for n in after if n not in before]
    common = [name for name in after if name in before]
    changed = [name for name in common if list(before[name]) != list(after[name])]
    found = [f"{name} was removed" for name in removed]
    for name in added:
        twins = [old for old in removed if list(before[old]) == list(after[name])]
        found.append(f"{name} is new" + (f" (it holds what {twins[0]} held)" if twins else ""))
    if changed:
        found.append(f"the data, tokenizer or template of {', '.join(changed)} changed")
    if common != [name for name in before if name in after]:
        found.append(f"the order was {', '.join(before)} and is {', '.join(after)}")
    return found
