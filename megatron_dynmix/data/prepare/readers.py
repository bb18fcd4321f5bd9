"""The files that rows come in: which of them a path means, and their rows one by one, whatever the container.

JSON is read strictly: one value per line, or the items of one array; nothing guessed, nothing lost. What a
file holds decides how it is read; a name that says otherwise (`.jsonl`, but compressed) is refused.
"""

import glob
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_dynmix.data.prepare.arrow import parquet_rows, saved_dataset_rows
from megatron_dynmix.data.prepare.structs import without_nulls
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import Number, parse_json

UTF8_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_CHUNK_BYTES = 1 << 20
_MAX_ROW_BYTES = 1 << 28
"""A row larger than this is a file without line ends, or a quote that is never closed."""
_MARK = re.compile(rb'[{}\[\],]|"[^"\\]*(?:\\.[^"\\]*)*(?P<end>"?)', re.DOTALL)
"""A sign, or a string with the quote that ends it if that is there already."""
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""The beginning of a frame without data, which some writers of zstd put in front."""
_UTF16 = "UTF-16 or UTF-32 text; convert it: iconv -f UTF-16 -t UTF-8"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive; extract it: unzip",
    b"\xfd7zXZ": "xz-compressed; decompress it: unxz",
    b"BZh": "bzip2-compressed; decompress it: bunzip2",
    b"\x04\x22\x4d\x18": "lz4-compressed; decompress it: unlz4",
    **dict.fromkeys(
        (b"ARROW1", b"\xff\xff\xff\xff"),
        "an Arrow file; give the dataset's folder, or export it as Parquet or JSON Lines",
    ),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff", b"{\0", b"[\0", b"\0{", b"\0[", b"\0\0"), _UTF16),
}
_DECOMPRESS = {".gz": "gunzip", ".zst": "unzstd"}
_HEAD_BYTES = 1 << 16


def split_lines(file: IO[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    r"""Yield ``(line_number, line)`` of every non-blank line, without the space around it.

    Lines end at ``\n`` only (texts may hold U+2028 and the like); ``\r\n`` and a leading byte order
    mark are accepted. Numbers start at 1 and count blank lines. A line too long to be a row is an
    InputError.
    """
    for number, raw in enumerate(iter(lambda: file.readline(_MAX_ROW_BYTES), b""), start=1):
        if number == 1:
            raw = raw.removeprefix(UTF8_BOM)
        if len(raw) >= _MAX_ROW_BYTES:
            raise InputError(f"{name}:{number}: {_too_long()}; end every row with a newline")
        if raw := raw.strip(_SPACE):
            yield number, raw


def split_array(file: IO[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    """Yield ``(item_number, item)``, numbers from 1, for the bytes of each item of one JSON array.

    Only brackets, commas and strings are looked at, so that an item that is no JSON spoils no other. One
    chunk and the item under way are held. An array that does not end, or that something follows, is an
    InputError.
    """
    text, position = b"", 0
    start, number, depth = 0, 1, -1  # of the item under way; depth counts the brackets open inside it
    while True:
        mark = _MARK.search(text, position)
        if mark is None or mark["end"] == b"":
            # nothing more here, or the beginning of a string: read on, and forget what stands before the item
            position = (mark.start() if mark else len(text)) - start
            text, start = text[start:], 0
            if len(text) >= _MAX_ROW_BYTES:
                raise InputError(f"{name}: item {number}: {_too_long()}; a quote or bracket is not closed")
            # as much again as the item has already, so that a long one is not scanned often
            chunk = file.read(max(_CHUNK_BYTES, len(text)))
            if not chunk:
                raise InputError(
                    f"{name}: item {number}: the file ends inside the array; it is cut off, or a quote or "
                    "bracket is not closed"
                )
            text += chunk
            continue
        position, sign = mark.end(), mark[0]
        if sign in b"{[":
            depth += 1
            if depth == 0:  # the array's own
                start = position
        elif depth and sign in b"}]":
            depth -= 1
        elif not depth and sign in b",]":
            item = text[start : mark.start()].strip(_SPACE)
            if item or sign == b"," or number > 1:  # an array may be empty
                yield number, item
                number += 1
            if sign == b"]":
                break
            start = position
        elif sign == b"}":
            raise InputError(f"{name}: item {number}: a closing brace that nothing opened; correct the file")
    rest = text[position:]
    while not rest.strip(_SPACE):
        rest = file.read(_CHUNK_BYTES)
        if not rest:
            return
    raise InputError(
        f"{name}: something follows the array after item {number - 1}; a .json file may hold one array, or "
        "one JSON object per line"
    )


def _too_long() -> str:
    return f"longer than {_MAX_ROW_BYTES >> 20} MiB"


@dataclass(frozen=True)
class RawRow:
    """A row as it is in its file, not parsed yet: cheap to hand to another process.

    ``place`` is ``file:line`` or ``file:item n``, ``content`` the bytes of a JSON text, or the row itself
    where the container is not JSON.
    """

    place: str
    content: bytes | dict[str, Any]

    def parse(self) -> Any:
        """Return the row's value, numbers with their digits; what is not strict JSON is a ValueError."""
        if isinstance(self.content, bytes):
            return parse_json(self.content, Number)
        return without_nulls(self.content)


def _refuse_rows_over_lines(path: Path, text: bytes) -> None:
    """Refuse JSON that is written for people to read, by its first two lines."""
    first, *others = (line.strip(_SPACE) for line in text.split(b"\n", 2)[:2])
    if first.endswith((b"{", b"[", b",")) and not any(map(_is_json, (first, *others))):
        raise InputError(
            f"{path}: rows over several lines; write one object per line (jq -c . {path.name}), or one array "
            "in a .json file"
        )


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def find_inputs(path: str | Path) -> list[Path]:
    """Return the files that a path means: a file, a pattern (`data/*.jsonl`), or those of a folder.

    They come in the order of their names. Of a folder, all files with a name that rows are read from;
    hidden ones (``.`` or ``_`` in front) and folders in it are not read. A dataset that Hugging Face
    `datasets` saved to a folder is one input, the folder itself. None at all is an InputError.
    """
    path = Path(path)
    if path.is_dir():
        return [path] if (path / "state.json").is_file() else _files_of_folder(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise InputError(f"{path}: a pipe or device, and rows are read more than once; save them to a file")
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if files := [name for name in found if name.is_file()]:
        return files
    raise InputError(f"{path}: there is no such file, folder or pattern; give an existing one")


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file())
        raise InputError(
            f"{folder}: holds the splits {', '.join(splits)} of a dataset; give the folder of one"
        )
    files = [entry for entry in _visible(folder) if _is_input(entry)]
    if not files:
        others = ", ".join(unread_files(folder)) or "nothing"
        raise InputError(
            f"{folder}: holds no file to read rows from ({others}); it needs {', '.join(_SUFFIXES)}, .gz or "
            ".zst of these, or a dataset saved by `datasets`"
        )
    return files


def unread_files(path: str | Path) -> tuple[str, ...]:
    """Return what lies in a folder beside the files that `find_inputs` finds there, other folders too."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "state.json").is_file():
        return ()
    others = [entry for entry in _visible(folder) if not _is_input(entry)]
    return tuple(f"{entry}/" if entry.is_dir() else str(entry) for entry in others)


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in sorted(folder.iterdir()) if entry.name[0] not in "._"]


def _is_input(entry: Path) -> bool:
    return entry.is_file() and bool(_kind_of_name(entry))


def is_compressed(path: Path) -> bool:
    """Tell by its name whether an input holds other bytes than its rows have as text."""
    return path.is_dir() or path.suffix.lower() in (*_COMPRESSED, ".parquet")


def raw_rows(path: str | Path) -> Iterator[RawRow]:
    """Yield the rows of one input, in order and in constant memory.

    Read are JSON Lines, one JSON array, both also through gzip and zstd, Parquet, and a folder that
    Hugging Face `datasets` saved a dataset to. An input that cannot be read as a whole (missing, not what its
    name says, UTF-16, damaged, or without a single row, which is known only at its end) is an InputError.
    """
    path = Path(path)
    found = False
    try:
        for row in _rows(path):
            found = True
            yield row
    except EOFError as error:
        raise InputError(f"{path}: the compressed data is cut off; get the file again") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the compressed data is damaged ({error}); get the file again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be read ({reason}); give an existing, whole file") from error
    if not found:
        raise InputError(f"{path}: holds no rows; give a file with one conversation per line")


def parsed_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the place and the value of each row; a ValueError in place of a row that is no JSON."""
    for row in raw_rows(path):
        try:
            yield row.place, row.parse()
        except ValueError as error:
            yield row.place, error


def _rows(path: Path) -> Iterator[RawRow]:
    if path.is_dir():
        yield from _numbered(path, saved_dataset_rows(path))
        return
    with path.open("rb") as file:
        container = _container(path, file.peek(8)[:8])
        if container == ".parquet":
            yield from _numbered(path, parquet_rows(path, file))
            return
        with _decompressed(file, container) as text:
            yield from _json_rows(path, text)


def _numbered(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield RawRow(f"{path}:item {number}", row)


def _container(path: Path, head: bytes) -> str:
    """Return `.gz`, `.zst`, `.parquet` or "" by the first bytes; refuse a name that says otherwise."""
    real = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), "")
    if _SKIPPABLE.match(head):
        real = ".zst"
    suffix = path.suffix.lower()
    named = suffix if suffix in _MAGIC.values() else ""
    if real == named or not _kind_of_name(path):
        return real
    if named:
        raise InputError(f"{path}: not a {named} file as its name says; name it by what it is")
    if real == ".parquet":
        raise InputError(f"{path}: a Parquet file under another name; name it .parquet")
    raise InputError(
        f"{path}: {_COMPRESSED[real]}-compressed, which its name does not say; name it {path.name}{real}, or "
        f"decompress it: {_DECOMPRESS[real]}"
    )


def _kind_of_name(path: Path) -> str:
    """Return `.jsonl`, `.json` or `.parquet` as the name has it, compressed or not; "" for any other name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _SUFFIXES else ""


@contextmanager
def _decompressed(file: io.BufferedReader, container: str) -> Iterator[io.BufferedReader]:
    if container == ".gz":
        with gzip.GzipFile(fileobj=file) as stream:
            yield io.BufferedReader(stream)
    elif container == ".zst":
        import pyarrow

        # unlike the plain bindings it says so when the stream is cut off, and reads all frames
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd") as stream:
            yield io.BufferedReader(stream)
    else:
        yield file


def _json_rows(path: Path, file: io.BufferedReader) -> Iterator[RawRow]:
    head = file.peek(_HEAD_BYTES)
    for start, remedy in _FOREIGN.items():
        if head.startswith(start):
            raise InputError(f"{path}: not a JSON file but {remedy}")
    if _SKIPPABLE.match(head) or any(head.startswith(magic) for magic in _MAGIC):
        raise InputError(f"{path}: compressed twice, or Parquet in a compressed file; decompress it once")
    text = head.removeprefix(UTF8_BOM).lstrip()
    if path.suffix.lower() in (".csv", ".tsv") and not text.startswith((b"{", b"[")):
        raise InputError(f"{path}: a table as text; export it as JSON Lines or Parquet, with a key a column")
    if not text.startswith(b"["):
        _refuse_rows_over_lines(path, text)
        for number, raw in split_lines(file, path):
            yield RawRow(f"{path}:{number}", raw)
        return
    if _kind_of_name(path) in (".jsonl", ".ndjson"):
        raise InputError(
            f"{path}:1: a JSON array, not JSON Lines; name it .json, or write one object per line: "
            "jq -c '.[]'"
        )
    if head.startswith(UTF8_BOM):
        file.read(len(UTF8_BOM))
    for number, raw in split_array(file, path):
        yield RawRow(f"{path}:item {number}", raw)
