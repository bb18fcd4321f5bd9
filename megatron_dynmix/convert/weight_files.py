"""The files of a folder's weights (safetensors): their headers, their numbers box by box, and a new file.

Such a file is the length of its header (8 bytes, little-endian), the header (JSON: each tensor's type, shape
and place), then the tensors without gaps. It is written box by box: memory does not grow with a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.convert.tensors import box, boxes_of, read_bytes, size_of
from megatron_dynmix.errors import InputError
from megatron_dynmix.families.names import Shape
from megatron_dynmix.files import read_object

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights that are trained, by their names in safetensors."""
CARRIED = {
    **DTYPES,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that can be read and written as they are."""
TYPE_NAMES = {dtype: name for name, dtype in CARRIED.items()}
"""What safetensors calls the types."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LFS = b"version https://git-lfs"
HEADER_ALIGNMENT = 8
SHOWN = 3
"""Names that a message gives of many."""


class WeightFiles:
    """The tensors of some files as they lie there; only headers are read when it is made.

    One file is held open at a time: a map of it counts as memory of the process as far as it was read.
    """

    def __init__(self, files: Mapping[Path, set[str] | None]) -> None:
        """Read the headers; `files` come with the tensors that an index says they hold, None without one."""
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.file_of: dict[str, Path] = {}
        for file, named in files.items():
            self._read_header(file, named)
        self._open: tuple[Path, Any] | None = None

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of a tensor, as a view of the file."""
        path = self.file_of[name]
        opened = self._open  # once: another thread may open another file
        if opened is None or opened[0] != path:
            opened = self._open = (path, safe_open(path, framework="pt"))
        part: torch.Tensor = opened[1].get_slice(name)[box(offset, shape)]
        return part

    def _read_header(self, path: Path, named: set[str] | None) -> None:
        header = _header_of(path)
        for name, (dtype, shape) in header.items():
            if name in self.file_of:
                other = self.file_of[name].name
                raise InputError(
                    f"{name} is in both {other} and {path.name} of {path.parent}; fetch it again"
                )
            if dtype not in CARRIED:
                raise InputError(f"{name} in {path} is of type {dtype}, which is not known; {remedy()}")
            self.file_of[name], self.shapes[name], self.dtypes[name] = path, shape, CARRIED[dtype]
        if named is not None and (absent := named - header.keys()):
            raise InputError(
                f"{path.parent / INDEX} says that {some(absent)} is in {path.name}, and it is not; fetch "
                "both again"
            )
        if named is not None and (extra := header.keys() - named):
            raise InputError(
                f"{path} holds {some(extra)}, which {INDEX} does not name there; fetch both again"
            )


def remedy() -> str:
    """Say which weights are taken."""
    return (
        f"weights are taken as {', '.join(DTYPES)}, or as config.json says that they were quantized: any "
        "other quantized model cannot be trained, take the one that it was made from"
    )


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Return the files of weights, each with the tensors that the index says are there; None without one."""
    if (folder / INDEX).is_file():
        named = read_object(folder / INDEX, "fetch it again").get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise InputError(f"{folder / INDEX} has no weight_map of tensors to files; fetch it again")
        files: dict[Path, set[str] | None] = {}
        for name, file in sorted(named.items(), key=lambda item: (item[1], item[0])):
            if Path(file).name != file:
                raise InputError(f"{folder / INDEX} names {file!r}, which is not a file of this folder")
            files.setdefault(folder / file, set()).add(name)  # type: ignore[union-attr]
        missing = {path.name for path in files if not path.is_file()}
        if (folder / SINGLE).is_file() and folder / SINGLE not in files:
            raise InputError(
                f"{folder} holds {SINGLE}, which its {INDEX} does not name: transformers would read the one, "
                "others what the other names; take out the one that is not of this model"
            )
        if missing:
            raise InputError(
                f"{folder} is missing {some(missing)} of the {len(files)} files that its index names; fetch "
                "what is missing"
            )
        return files
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if pickled := sorted(path.name for pattern in PICKLED for path in folder.glob(pattern)):
        raise InputError(
            f"{folder} has its weights as pickle ({some(pickled)}), which can run code when it is read; "
            "make safetensors of them where that can do no harm, with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR), and give that folder"
        )
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}; fetch the weights")


def _header_of(path: Path) -> dict[str, tuple[str, Shape]]:
    """Return the tensors of a file: name -> type, as safetensors names it, and shape."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise InputError(f"{path} is a pointer of Git LFS and holds no weights; run `git lfs pull` there")
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not whole, or not a safetensors file ({error}; {path.stat().st_size} bytes); "
            "fetch it again"
        ) from None


def write_shard(
    tensors: Tensors, names: Iterable[str], path: Path, advance: Callable[[int], object] = lambda nbytes: None
) -> None:
    """Write one file of weights; `advance` is told of bytes that were written."""
    # the larger types first: then every number lies at a multiple of its size
    ordered = sorted(names, key=lambda name: -tensors.dtypes[name].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        begin, end = end, end + size_of(tensors, name)
        kind, shape = TYPE_NAMES[tensors.dtypes[name]], list(tensors.shapes[name])
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in ordered:
            for part in boxes_of(tensors, name):
                file.write(read_bytes(tensors, part).data)
                advance(part.nbytes)


def some(names: Iterable[str]) -> str:
    """Return the first of many names, and how many more there are."""
    every = sorted(names)
    rest = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + rest
