"""The files that rows come in: which of them a path means, and their rows one by one, whatever the container.

JSON is read strictly: one value per line, or the items of one array; nothing guessed, nothing lost. What a
file holds decides how it is read; a name that says otherwise (`.jsonl`, but compressed) is refused.
"""

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.files import parse_json

UTF8_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_CHUNK_BYTES = 1 << 20
_MAX_ROW_BYTES = 1 << 28
"""A row larger than this is a file without line ends, or a quote that is never closed."""
_IN_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_OUTSIDE = re.compile(rb'["{}\[\],]')


def split_lines(file: IO[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    r"""Yield ``(line_number, line)`` of every non-blank line, without the space around it.

    Lines end at ``\n`` only (texts may hold U+2028 and the like); ``\r\n`` and a leading byte order
    mark are accepted. Numbers start at 1 and count blank lines.

    Raises:
        InputError: a line is too long to be a row; ``name`` is how the message calls the file.

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

    Only brackets, commas and quotes are looked at, so that an item that is no JSON spoils no other.

    Raises:
        InputError: the array does not end, or something follows it.

    """
    scanner = _ArrayScanner(file, name)
    number = 0
    for number, raw in enumerate(scanner.items(), start=1):
        yield number, raw
    if scanner.next_sign():
        raise InputError(
            f"{name}: something follows the array after item {number}; a .json file may hold one array, or "
            "one JSON object per line"
        )


class _ArrayScanner:
    """Cuts the text of an array into items; holds one chunk and the item under way."""

    def __init__(self, file: IO[bytes], name: object) -> None:
        self.file = file
        self.name = name
        self.buffer = b""
        self.position = 0
        self.number = 1

    def items(self) -> Iterator[bytes]:
        opening = self.next_sign()
        assert opening == b"[", "the caller looked"
        depth, start, seen = 0, self.position, False
        while True:
            mark = self._next(start)
            if mark is None:
                raise InputError(
                    f"{self.name}: item {self.number}: the file ends inside the array; it is cut off, or a "
                    "quote or bracket is not closed"
                )
            sign, at, start = mark
            if sign in b"{[":
                depth += 1
            elif depth and sign in b"}]":
                depth -= 1
            elif not depth and sign in b",]":
                item = self.buffer[start:at].strip(_SPACE)
                if item or sign == b"," or seen:
                    yield item
                    self.number += 1
                seen = True
                if sign == b"]":
                    return
                start = self.position
            elif not depth and sign == b"}":
                raise InputError(
                    f"{self.name}: item {self.number}: a closing brace that nothing opened; correct the file"
                )

    def _next(self, start: int) -> tuple[bytes, int, int] | None:
        """Return the next sign outside strings, where it is, and where ``start`` is now; None at the end."""
        while True:
            found = _OUTSIDE.search(self.buffer, self.position)
            if found is None:
                self.position = len(self.buffer)
                if not self._more(start):
                    return None
                start = 0
                continue
            if found[0] != b'"':
                self.position = found.end()
                return found[0], found.start(), start
            while True:
                end = _IN_STRING.match(self.buffer, found.end()).end()  # type: ignore[union-attr]
                if self.buffer[end : end + 1] == b'"':
                    self.position = end + 1
                    break
                shift = start
                self.position = found.end()
                if not self._more(start):
                    return None
                found = _OUTSIDE.search(self.buffer, found.start() - shift)
                assert found is not None, "the quote is still there"
                start = 0

    def _more(self, start: int) -> bool:
        """Read on, and forget what stands before ``start``; positions count from there then."""
        size = len(self.buffer) - start
        if size >= _MAX_ROW_BYTES:
            raise InputError(
                f"{self.name}: item {self.number}: {_too_long()}; a quote or bracket is not closed"
            )
        # as much again as the item has already, so that a long one is not scanned often
        chunk = self.file.read(max(_CHUNK_BYTES, size))
        self.buffer = self.buffer[start:] + chunk
        self.position -= start
        return bool(chunk)

    def next_sign(self) -> bytes:
        """Return the next byte that is no space, or nothing at the end."""
        while True:
            while self.position < len(self.buffer):
                sign = self.buffer[self.position : self.position + 1]
                self.position += 1
                if sign not in _SPACE:
                    return sign
            self.buffer, self.position = self.file.read(_CHUNK_BYTES), 0
            if not self.buffer:
                return b""


def _too_long() -> str:
    return f"longer than {_MAX_ROW_BYTES >> 20} MiB"


_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
_UTF16 = "UTF-16 or UTF-32 text; convert it: iconv -f UTF-16 -t UTF-8"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive; extract it: unzip",
    b"\xfd7zXZ": "xz-compressed; decompress it: unxz",
    b"BZh": "bzip2-compressed; decompress it: bunzip2",
    b"ARROW1": "an Arrow file; give the dataset's folder, or export it as Parquet or JSON Lines",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"{\x00": _UTF16,
    b"[\x00": _UTF16,
    b"\x00{": _UTF16,
    b"\x00[": _UTF16,
    b"\x00\x00": _UTF16,
}
_DECOMPRESS = {".gz": "gunzip", ".zst": "unzstd"}
_BATCH_ROWS = 256
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class RawRow:
    """A row as it is in its file, not parsed yet: cheap to hand to another process.

    ``place`` is ``file:line`` or ``file:item n``, ``number`` the line or item (from 1), ``content`` the
    bytes of a JSON text, or the row itself where the container is not JSON.
    """

    place: str
    number: int
    content: bytes | dict[str, Any]

    def parse(self) -> Any:
        """Return the row's value; what is not strict JSON is a ValueError with a short reason."""
        return parse_json(self.content) if isinstance(self.content, bytes) else self.content


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
    files = [
        entry
        for entry in sorted(folder.iterdir())
        if entry.is_file() and entry.name[0] not in "._" and _kind_of_name(entry)
    ]
    if not files:
        raise InputError(
            f"{folder}: holds no file to read rows from; it needs {', '.join(_SUFFIXES)}, .gz or .zst of "
            "these, or a dataset saved by `datasets`"
        )
    return files


def is_compressed(path: Path) -> bool:
    """Tell by its name whether an input holds other bytes than its rows have as text."""
    return path.is_dir() or path.suffix.lower() in (*_COMPRESSED, ".parquet")


def raw_rows(path: str | Path) -> Iterator[RawRow]:
    """Yield the rows of one input, in order and in constant memory.

    Read are JSON Lines, one JSON array, both also through gzip and zstd, Parquet, and a folder that
    Hugging Face `datasets` saved a dataset to.

    Raises:
        InputError: the input as a whole cannot be read: missing, not what its name says, UTF-16, damaged,
            or without a single row (known only at its end).

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
        yield from _saved_dataset(path)
        return
    with path.open("rb") as file:
        container = _container(path, file.peek(8)[:8])
        if container == ".parquet":
            yield from _parquet(path, file)
            return
        with _decompressed(file, container) as text:
            yield from _json_rows(path, text)


def _container(path: Path, head: bytes) -> str:
    """Return `.gz`, `.zst`, `.parquet` or "" by the first bytes; refuse a name that says otherwise."""
    real = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), "")
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
    if any(head.startswith(magic) for magic in _MAGIC):
        raise InputError(f"{path}: compressed twice, or Parquet in a compressed file; decompress it once")
    if not head.removeprefix(UTF8_BOM).lstrip().startswith(b"["):
        for number, raw in split_lines(file, path):
            yield RawRow(f"{path}:{number}", number, raw)
        return
    if _kind_of_name(path) in (".jsonl", ".ndjson"):
        raise InputError(
            f"{path}:1: a JSON array, not JSON Lines; name it .json, or write one object per line: "
            "jq -c '.[]'"
        )
    if head.startswith(UTF8_BOM):
        file.read(len(UTF8_BOM))
    for number, raw in split_array(file, path):
        yield RawRow(f"{path}:item {number}", number, raw)


def _parquet(path: Path, file: IO[bytes]) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(f"{path}:item {number}", number, row)
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: damaged Parquet ({_first_line(error)}); get the file again") from error


def _saved_dataset(folder: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import ipc

    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
        if state.get("_indices_files"):
            raise InputError(f"{folder}: saved with a selection of rows by an old version; save it again")
        number = 0
        for name in names:
            with pyarrow.memory_map(str(folder / name)) as source:
                for batch in ipc.open_stream(source):
                    for start in range(0, len(batch), _BATCH_ROWS):
                        for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                            number += 1
                            yield RawRow(f"{folder}:item {number}", number, row)
    except InputError:
        raise
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: not a whole dataset saved by `datasets` ({_first_line(error)}); save it again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
