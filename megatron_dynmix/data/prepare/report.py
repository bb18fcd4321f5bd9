"""What an input file held when it was read, so that an unchanged one is not prepared again.

The report beside a prepared source: what became of its rows, and what it was made from.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from megatron_dynmix.config.run_config import RowFormat
from megatron_dynmix.data.prepare.examples import DIGEST_BYTES
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import sha256, write_atomically

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input as it was read: its path, size in bytes, time of last change (ns) and SHA-256."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def read_input(path: Path) -> InputFile:
    """Read a file (or the files of a folder that is one input) through for its digest.

    Raises:
        InputError: it cannot be read.

    """
    size, mtime_ns = _size_and_time(path)
    digest = hashlib.sha256()
    try:
        for part in _files(path):
            with part.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
    except OSError as error:
        raise _unreadable(path, error) from error
    return InputFile(path=str(path), size=size, mtime_ns=mtime_ns, sha256=digest.hexdigest())


def recheck(inputs: Sequence[Path], recorded: Sequence[InputFile]) -> tuple[InputFile, ...] | None:
    """Return the files as they are now if they hold the bytes that were recorded, else None.

    A file of the same path, size and time of last change is taken to be the same: what takes an hour
    to prepare may take a minute to read. Where only the path or time differs its bytes decide.

    Raises:
        InputError: a file cannot be read.

    """
    stats = [_size_and_time(path) for path in inputs]
    if [size for size, _ in stats] != [before.size for before in recorded]:
        return None
    files = []
    for path, (_, mtime_ns), before in zip(inputs, stats, recorded, strict=True):
        same = (str(path), mtime_ns) == (before.path, before.mtime_ns)
        files.append(before if same else read_input(path))
        if files[-1].sha256 != before.sha256:
            return None
    return tuple(files)


def refuse_changed(inputs: Sequence[InputFile]) -> None:
    """Refuse files that are not what they were when their digests were taken.

    Raises:
        InputError: a file was changed meanwhile.

    """
    for before in inputs:
        if _size_and_time(Path(before.path)) != (before.size, before.mtime_ns):
            raise InputError(f"{before.path}: was changed while it was read; prepare it when it is complete")


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stats = [part.stat() for part in _files(path)]
    except OSError as error:
        raise _unreadable(path, error) from error
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def _files(path: Path) -> list[Path]:
    """The file itself, or those of a folder that is one input."""
    if not path.is_dir():
        return [path]
    return sorted(part for part in path.rglob("*") if part.is_file())


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}); give an existing file")


WRITTEN = ("bin", "idx", "digests", "json")
FORMAT_VERSION = 2
"""Raised when the same inputs would give other files; sources of another version are prepared anew."""


_REPORT_HEAD = b'{\n  "name": '


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything but the rows that decides the files of a source.

    ``tokenizer`` and ``template`` are fingerprints (of a built-in template its name); ``fields`` are
    names that our keys have in the rows; ``split_length`` is the positions above which conversations
    are split at turn borders (None: never), ``held_out`` how many texts are kept from training.
    """

    tokenizer: str
    template: str
    format: RowFormat = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    split_length: int | None = None
    held_out: int = 0

    @property
    def prints(self) -> list[str]:
        """The tokenizer, the template, and every other setting that is not as it is if not given."""
        others = [item for item in fields(self) if item.name not in ("tokenizer", "template")]
        default = Recipe(tokenizer=self.tokenizer, template=self.template)
        values = {item.name: getattr(self, item.name) for item in others}
        changed = {name: value for name, value in values.items() if value != getattr(default, name)}
        return [self.tokenizer, self.template, *(f"{name}: {value}" for name, value in changed.items())]


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What became of a source's rows.

    ``examples`` are written. ``untrained`` (no token to train on) and ``broken`` (no usable
    conversation) rows are not; the first few stand in ``first_broken`` as ``file:line: reason``.
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
    inputs: tuple[InputFile, ...]
    recipe: Recipe
    probe_of: str | None
    version: int
    bin_size: int
    idx_size: int

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer."""
        return self.recipe.tokenizer

    @property
    def template(self) -> str:
        """Fingerprint of the template, and of what is trained on."""
        return self.recipe.template

    @property
    def mean_length(self) -> float:
        """Tokens of an example, on average."""
        return self.tokens / self.examples

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes when the prepared files change."""
        parts = asdict(replace(self, inputs=()))
        parts["inputs"] = [file.sha256 for file in self.inputs]
        return sha256(json.dumps(parts, sort_keys=True))


def file_of(prefix: Path, suffix: str) -> Path:
    """Return ``prefix.suffix``; the name of a prefix may itself hold dots."""
    return prefix.parent / f"{prefix.name}.{suffix}"


def probe_prefix(prefix: Path) -> Path:
    """Where the examples that were held out of a source are."""
    return file_of(prefix, "probe")


def write_report(prefix: Path, report: SourceReport) -> None:
    """Write ``prefix.json``, whole or not at all."""
    write_atomically(file_of(prefix, "json"), json.dumps(asdict(report), indent=2) + "\n")


def load_report(prefix: Path) -> SourceReport:
    """Read the report of a prepared source and check that its files are whole.

    Raises:
        InputError: a file is missing, damaged, of another size than reported or another version.

    """
    remedy = "run `megatron-dynmix prepare` for it"
    try:
        content = json.loads(file_of(prefix, "json").read_text(encoding="utf-8"))
        if content["version"] != FORMAT_VERSION:
            raise InputError(
                f"{prefix}: prepared in format {content['version']}, not {FORMAT_VERSION}; {remedy}"
            )
        content["inputs"] = tuple(InputFile(**entry) for entry in content["inputs"])
        content["first_broken"] = tuple(content["first_broken"])
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


def current_report(prefix: Path, inputs: Sequence[Path], recipe: Recipe) -> SourceReport | None:
    """Return the report of a source if its files come from these inputs by this recipe, else None.

    Raises:
        InputError: an input cannot be read.

    """
    try:
        report = load_report(prefix)
        if recipe.held_out:
            load_report(probe_prefix(prefix))
    except InputError:
        return None
    if report.recipe != recipe or report.probe_of is not None:
        return None
    files = recheck(inputs, report.inputs)
    if files is None:
        return None
    if files != report.inputs:
        # the same bytes elsewhere or written anew: next time they need not be read to know that
        report = replace(report, inputs=files)
        with suppress(OSError):  # it may be a place that only others write to
            write_report(prefix, report)
    return report


def refuse_overwriting(prefix: Path, inputs: Sequence[Path]) -> None:
    """Refuse a prefix whose files would take the place of what was not written by `prepare`.

    Raises:
        InputError: an input, or another JSON file, stands there, or the prefix has no name.

    """
    if not prefix.name:
        raise InputError(f"the prefix {prefix} has no name; give one such as prepared/code")
    written = {file_of(one, suffix).resolve() for one in (prefix, probe_prefix(prefix)) for suffix in WRITTEN}
    for path in inputs:
        if path.resolve() in written:
            raise InputError(
                f"{path}: rows are read from it, and {prefix} would be written over it; prepare to another "
                "place (--output, or data.prepared_dir)"
            )
    report = file_of(prefix, "json")
    # a report that a crash has cut off may be replaced
    if report.is_file() and not _REPORT_HEAD.startswith(_head(report)):
        raise InputError(
            f"{report}: is no report of a prepared source, and would be written over; move it, or prepare to "
            "another place (--output, or data.prepared_dir)"
        )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_REPORT_HEAD))
