"""Preparing a source: JSONL files become Megatron's ``.bin`` and ``.idx`` and a report beside them.

One document per conversation, one sequence per run of tokens that are all trained on or all not; the
sequence's mode byte says which (1 = trained). Shape legend: T tokens of one example.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from numpy.typing import NDArray

from megatron_dynmix.config.tree import Template
from megatron_dynmix.data.conversation import parse_sharegpt
from megatron_dynmix.data.jsonl import BadLine, read_jsonl
from megatron_dynmix.data.template import Rendered, render, token_mask
from megatron_dynmix.data.tokenizer import Tokenizer
from megatron_dynmix.errors import InputError

FORMAT_VERSION = 1
"""Raised when the same inputs would give other files; sources of another version are prepared anew."""

_BATCH = 512
_CHUNK_BYTES = 1 << 20
_BROKEN_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input as it was read: its path, size in bytes and SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What became of a source's rows: ``examples + untrained + broken`` is the number of its rows.

    ``examples`` are written; ``untrained`` (no token to train on) and ``broken`` (no usable
    conversation) rows are not. ``duplicates`` counts written examples whose text was written before.
    ``tokens``, ``trained_tokens`` and ``max_length`` (the longest example) are in tokens.
    ``first_broken`` holds the first five as ``file:line: reason``.
    """

    name: str
    examples: int
    tokens: int
    trained_tokens: int
    max_length: int
    untrained: int
    duplicates: int
    broken: int
    first_broken: tuple[str, ...]
    inputs: tuple[InputFile, ...]
    tokenizer: str
    template: str
    version: int
    bin_size: int
    idx_size: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes when the prepared files change."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def prepare_source(
    *, name: str, inputs: Sequence[Path], prefix: Path, tokenizer: Tokenizer, template: Template
) -> SourceReport:
    """Write ``prefix.bin``, ``prefix.idx`` and, last, ``prefix.json`` (the returned report).

    Memory does not grow with the texts, only by some bytes per example. The files appear under
    their names when complete; without ``prefix.json`` a source counts as not prepared.

    Raises:
        InputError: an input cannot be read, the template does not fit, or no example is left.

    """
    if not inputs:
        raise InputError(f"source {name}: no input files given; give one JSONL file or more")
    files = tuple(_input_file(Path(path)) for path in inputs)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=prefix.parent, prefix=f".{prefix.name}.") as folder:
        draft = Path(folder) / "source"
        writer = _Writer(draft, tokenizer)
        rows = _rendered_rows(inputs, tokenizer, template, writer)
        while batch := list(islice(rows, _BATCH)):
            writer.add(batch)
        writer.finish()
        if not writer.examples:
            first = "; ".join(writer.first_broken) or "no row has a token to train on"
            raise InputError(
                f"source {name}: none of {writer.broken + writer.untrained} rows can be trained on "
                f"({first}); "
                'rows must be {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}'
            )
        report = writer.report(name, files, template)
        _file(draft, "json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        # The report vouches for the other two: away with the old one first, in with the new one last.
        _file(prefix, "json").unlink(missing_ok=True)
        for suffix in ("bin", "idx", "json"):
            os.replace(_file(draft, suffix), _file(prefix, suffix))
    return report


def load_report(prefix: Path) -> SourceReport:
    """Read the report of a prepared source and check that its files are whole.

    Raises:
        InputError: a file is missing, damaged, of another size than reported or another version.

    """
    remedy = "run `megatron-dynmix prepare` for it"
    try:
        fields = json.loads(_file(prefix, "json").read_text())
        fields["inputs"] = tuple(InputFile(**entry) for entry in fields["inputs"])
        fields["first_broken"] = tuple(fields["first_broken"])
        report = SourceReport(**fields)
        sizes = (_file(prefix, "bin").stat().st_size, _file(prefix, "idx").stat().st_size)
    except OSError as error:
        raise InputError(
            f"{prefix}: not a prepared source ({error.filename}: {error.strerror}); {remedy}"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{prefix}.json: not a report of a prepared source ({error}); {remedy}") from error
    if report.version != FORMAT_VERSION:
        raise InputError(f"{prefix}: prepared in format {report.version}, not {FORMAT_VERSION}; {remedy}")
    if sizes != (report.bin_size, report.idx_size):
        raise InputError(
            f"{prefix}: .bin and .idx have {sizes[0]} and {sizes[1]} bytes where the report says "
            f"{report.bin_size} and {report.idx_size}; {remedy}"
        )
    return report


def is_current(prefix: Path, inputs: Sequence[Path], tokenizer: Tokenizer, template: Template) -> bool:
    """Tell whether the prepared files come from the same input bytes, tokenizer and template.

    Raises:
        InputError: an input cannot be read.

    """
    try:
        report = load_report(prefix)
    except InputError:
        return False
    if (report.tokenizer, report.template) != (tokenizer.fingerprint, template):
        return False
    files = [_input_file(Path(path)) for path in inputs]
    return [(file.size, file.sha256) for file in files] == [
        (file.size, file.sha256) for file in report.inputs
    ]


class _Writer:
    """Tokenises rendered conversations, appends them to the draft and counts."""

    def __init__(self, draft: Path, tokenizer: Tokenizer) -> None:
        self.draft = draft
        self.tokenizer = tokenizer
        self.builder = IndexedDatasetBuilder(
            str(_file(draft, "bin")), dtype=DType.optimal_dtype(tokenizer.vocab_size), multimodal=True
        )
        self.examples = 0
        self.tokens = self.trained_tokens = self.max_length = 0
        self.untrained = self.broken = 0
        self.first_broken: list[str] = []
        self.seen: set[bytes] = set()

    def add(self, batch: list[Rendered]) -> None:
        encoded = self.tokenizer.encode_batch([rendered.text for rendered in batch])
        for rendered, (ids_T, char_starts_T) in zip(batch, encoded, strict=True):
            trained_T = token_mask(char_starts_T, rendered.trained_spans)
            if not trained_T.any():
                self.untrained += 1
                continue
            borders = _run_borders(trained_T)
            self.builder.add_document(
                ids_T, np.diff(borders).tolist(), trained_T[borders[:-1]].astype(int).tolist()
            )
            self.examples += 1
            self.tokens += len(ids_T)
            self.trained_tokens += int(trained_T.sum())
            self.max_length = max(self.max_length, len(ids_T))
            self.seen.add(hashlib.blake2b(rendered.text.encode(), digest_size=12).digest())

    def add_broken(self, place: str, reason: str) -> None:
        self.broken += 1
        if len(self.first_broken) < _BROKEN_SHOWN:
            self.first_broken.append(f"{place}: {reason}")

    def finish(self) -> None:
        self.builder.finalize(str(_file(self.draft, "idx")))

    def report(self, name: str, files: tuple[InputFile, ...], template: Template) -> SourceReport:
        return SourceReport(
            name=name,
            examples=self.examples,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            max_length=self.max_length,
            untrained=self.untrained,
            duplicates=self.examples - len(self.seen),
            broken=self.broken,
            first_broken=tuple(self.first_broken),
            inputs=files,
            tokenizer=self.tokenizer.fingerprint,
            template=template,
            version=FORMAT_VERSION,
            bin_size=_file(self.draft, "bin").stat().st_size,
            idx_size=_file(self.draft, "idx").stat().st_size,
        )


def _rendered_rows(
    inputs: Sequence[Path], tokenizer: Tokenizer, template: Template, writer: _Writer
) -> Iterator[Rendered]:
    for path in inputs:
        for line, row in read_jsonl(path):
            place = f"{path}:{line}"
            if isinstance(row, BadLine):
                writer.add_broken(place, row.reason)
                continue
            try:
                conversation = parse_sharegpt(row)
            except ValueError as error:
                writer.add_broken(place, str(error))
                continue
            try:
                yield render(conversation, tokenizer, template)
            except InputError as error:
                raise InputError(f"{place}: {error}") from error


def _run_borders(trained_T: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the borders of the runs of equal values, 0 and T included."""
    return np.concatenate([[0], np.flatnonzero(np.diff(trained_T)) + 1, [len(trained_T)]])


def _file(prefix: Path, suffix: str) -> Path:
    # not with_suffix: the name of a prefix may hold dots
    return prefix.parent / f"{prefix.name}.{suffix}"


def _input_file(path: Path) -> InputFile:
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give an existing JSONL file") from error
    return InputFile(path=str(path), size=size, sha256=digest.hexdigest())
