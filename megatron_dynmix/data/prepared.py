"""A prepared source on disk: its files, the report of what became of its rows, and its texts' digests.

A digest takes 16 bytes, so a million examples (about 1 GB of conversations) take 16 MB on disk, and some
40 MB while they are sorted. Shape legend: N examples of one source or of all.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config.run_config import RowFormat
from megatron_dynmix.data.prepare.notices import Noticed
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import sha256, write_atomically

WRITTEN = ("bin", "idx", "digests", "json")
FORMAT_VERSION = 3
"""Raised when the same inputs would give other files; sources of another version are prepared again."""
DIGEST_BYTES = 16
DIGEST = np.dtype([("high", ">u8"), ("low", ">u8")])
"""128 bits of BLAKE2b of an example's text, as two numbers; the order of (high, low) is that of the bytes."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input as it was read: its path, size in bytes, time of last change (ns) and SHA-256."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything but the rows that decides the files of a source.

    ``tokenizer`` and ``template`` are fingerprints (of a built-in template its name); ``fields`` are
    names that our keys have in the rows, ``roles`` what the names of speakers there mean;
    ``split_length`` is the positions above which conversations are split at turn borders (None: never),
    ``held_out`` how many texts are kept from training.
    """

    tokenizer: str
    template: str
    format: RowFormat = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    split_length: int | None = None
    held_out: int = 0

    @property
    def prints(self) -> list[str]:
        """The tokenizer, the template, and every other setting that is not as it is if not given."""
        default = vars(Recipe(tokenizer=self.tokenizer, template=self.template))
        changed = [f"{name}: {value}" for name, value in vars(self).items() if value != default[name]]
        return [self.tokenizer, self.template, *changed]


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What became of a source's rows.

    ``examples`` are written. ``untrained`` (no token to train on) and ``broken`` (no usable
    conversation) rows are not; the first few are in ``first_broken`` as ``file:line: reason``.
    ``notices`` tell what rows have that a user should know of, ``unread`` what lies in the folders of the
    inputs and is none.
    ``split`` conversations became ``split_parts`` examples; ``held_out`` examples are in the probe's
    files. So ``rows - split + split_parts = examples + held_out + untrained + broken``.
    ``duplicates`` counts written examples whose text was written before. ``tokens``,
    ``trained_tokens`` and ``max_length`` (the longest example) are in tokens.

    The files of a probe that was held out have a report of their own, with ``probe_of`` the name of
    the source; its counts are those of the examples in them.
    """

    name: str
    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    max_length: int
    untrained: int
    duplicates: int
    broken: int
    split: int
    split_parts: int
    held_out: int
    first_broken: tuple[str, ...]
    notices: tuple[Noticed, ...]
    inputs: tuple[InputFile, ...]
    unread: tuple[str, ...]
    recipe: Recipe
    probe_of: str | None
    version: int
    bin_size: int
    idx_size: int

    @property
    def mean_length(self) -> float:
        """Tokens of an example, on average."""
        return self.tokens / self.examples

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes when the prepared files change."""
        parts = asdict(replace(self, inputs=(), unread=()))
        parts["inputs"] = [file.sha256 for file in self.inputs]
        return sha256(json.dumps(parts, sort_keys=True))


def file_of(prefix: Path, suffix: str) -> Path:
    """Return ``prefix.suffix``; the name of a prefix may itself hold dots."""
    return prefix.parent / f"{prefix.name}.{suffix}"


def probe_prefix(prefix: Path) -> Path:
    """Return where the examples that were held out of a source are."""
    return file_of(prefix, "probe")


def write_report(prefix: Path, report: SourceReport) -> None:
    """Write ``prefix.json``."""
    write_atomically(file_of(prefix, "json"), json.dumps(asdict(report), indent=2) + "\n")


def load_report(prefix: Path) -> SourceReport:
    """Read the report of a prepared source.

    A file that is missing, damaged, of another size than reported or another version is an InputError.
    """
    remedy = "run `megatron-dynmix prepare` for it"
    try:
        content = json.loads(file_of(prefix, "json").read_text(encoding="utf-8"))
        if content["version"] != FORMAT_VERSION:
            raise InputError(
                f"{prefix}: prepared in format {content['version']}, not {FORMAT_VERSION}; {remedy}"
            )
        content["inputs"] = tuple(InputFile(**entry) for entry in content["inputs"])
        for name in ("first_broken", "unread"):
            content[name] = tuple(content[name])
        content["notices"] = tuple(Noticed(**entry) for entry in content["notices"])
        content["recipe"] = Recipe(**content["recipe"])
        report = SourceReport(**content)
        sizes = [file_of(prefix, suffix).stat().st_size for suffix in ("bin", "idx", "digests")]
    except OSError as error:
        raise InputError(
            f"{prefix}: not a prepared source ({Path(error.filename).name}: {error.strerror}); {remedy}"
        ) from error
    except InputError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{prefix}.json: not a report of a prepared source ({error}); {remedy}") from error
    expected = [report.bin_size, report.idx_size, report.examples * DIGEST_BYTES]
    if sizes != expected:
        raise InputError(
            f"{prefix}: .bin, .idx and .digests have {sizes[0]}, {sizes[1]} and {sizes[2]} bytes where the "
            f"report says {expected[0]}, {expected[1]} and {expected[2]}; {remedy}"
        )
    return report


def refuse_broken(name: str, first_broken: Sequence[str]) -> None:
    """Refuse a source for the first of its rows that cannot be used, by its file and line."""
    if first_broken:
        raise InputError(
            f"{first_broken[0]} (source {name} is strict: every row must be good; leave out strict to count "
            "bad rows)"
        )


@dataclass(frozen=True)
class Shared:
    """How many different texts stand in both of two sources (indices into what was compared)."""

    first: int
    second: int
    texts: int


def read_digests(path: Path) -> NDArray[np.void]:
    """Return the digests of a prepared source's examples, in the order of its documents."""
    return np.fromfile(path, dtype=DIGEST)


def count_duplicates(digests_N: NDArray[np.void]) -> int:
    """Return how many examples have a text that an earlier example has."""
    order_N = _order(digests_N)
    return int(_equals_previous(digests_N[order_N]).sum())


def shared_texts(digests: Sequence[NDArray[np.void]]) -> list[Shared]:
    """Return the pairs of sources that have a text in common, and how many texts they share."""
    all_N = np.concatenate(digests)
    source_N = np.repeat(np.arange(len(digests)), [len(one) for one in digests])
    order_N = _order(all_N)
    group_N = np.cumsum(~_equals_previous(all_N[order_N]))
    # one entry for each (text, source), then the texts that have more than one
    groups_and_sources = np.unique(np.stack([group_N, source_N[order_N]], axis=1), axis=0)
    counts: Counter[tuple[int, int]] = Counter()
    borders = np.flatnonzero(np.diff(groups_and_sources[:, 0], prepend=-1, append=-1))
    several = np.flatnonzero(np.diff(borders) > 1)
    for first, last in zip(borders[several], borders[several + 1], strict=True):
        counts.update(combinations(groups_and_sources[first:last, 1].tolist(), 2))
    return [Shared(*pair, texts) for pair, texts in sorted(counts.items())]


def _order(digests_N: NDArray[np.void]) -> NDArray[np.intp]:
    return np.lexsort((digests_N["low"], digests_N["high"]))


def _equals_previous(sorted_N: NDArray[np.void]) -> NDArray[np.bool_]:
    return np.concatenate([[False], sorted_N[1:] == sorted_N[:-1]])[: len(sorted_N)]
