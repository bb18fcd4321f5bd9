"""The files that a source is prepared from: what they held when they were read, and whether they still do."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron_dynmix.data.prepared import (
    WRITTEN,
    InputFile,
    Recipe,
    SourceReport,
    file_of,
    load_report,
    probe_prefix,
    write_report,
)
from megatron_dynmix.errors import InputError

_PIECE_BYTES = 1 << 20
_REPORT_HEAD = b'{\n  "name": '


def read_input(path: Path) -> InputFile:
    """Read a file (or the files of a folder that is one input) through for its digest."""
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
    """Refuse files that are not what they were when their digests were taken."""
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
    """Return the file itself, or those of a folder that is one input."""
    if not path.is_dir():
        return [path]
    return sorted(part for part in path.rglob("*") if part.is_file())


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}); give an existing file")


def current_report(prefix: Path, inputs: Sequence[Path], recipe: Recipe) -> SourceReport | None:
    """Return the report of a source if its files come from these inputs by this recipe, else None."""
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
        # the same bytes elsewhere, or written again: next time they need not be read to know that
        report = replace(report, inputs=files)
        with suppress(OSError):  # it may be a place that only others write to
            write_report(prefix, report)
    return report


def refuse_overwriting(prefix: Path, inputs: Sequence[Path]) -> None:
    """Refuse a prefix without a name, or where an input or a JSON file of others would be overwritten."""
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
    if not report.is_file():
        return
    with report.open("rb") as file:
        head = file.read(len(_REPORT_HEAD))
    if not _REPORT_HEAD.startswith(head):  # one that a crash has cut off may be replaced
        raise InputError(
            f"{report}: is no report of a prepared source, and would be written over; move it, or prepare to "
            "another place (--output, or data.prepared_dir)"
        )
