"""A folder of a Hugging Face model: its configuration, and its weights read box by box from safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_dynmix.config.hugging_face import read_config
from megatron_dynmix.config.hugging_face_defaults import unsaid
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.prediction import PREDICTION, prediction_layers
from megatron_dynmix.convert.tensors import box
from megatron_dynmix.convert.weight_map import WeightMap
from megatron_dynmix.errors import InputError
from megatron_dynmix.families.names import Shape
from megatron_dynmix.files import read_object

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights that are taken, by their names in safetensors."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps chat templates beside the first."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NO_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
COMPUTED = (".rotary_emb.inv_freq",)
"""Ends of the names of tensors that old folders hold though nothing in them was learned."""
LFS = b"version https://git-lfs"
SHOWN = 3
"""Names that a message gives of many."""


class HuggingFaceFolder:
    """The weights of a folder, checked when it is opened; of them, only headers are read then.

    One file is held open at a time: a map of it counts as memory of the process as far as it was read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.settings = read_config(_existing(path) / "config.json", "fetch it again")
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.file_of: dict[str, Path] = {}
        self.computed: tuple[str, ...] = ()
        """Tensors in which nothing was learned; they are not read."""
        self.predicting: tuple[str, ...] = ()
        """Tensors of layers for multi-token prediction; they are no part of the model, and not read."""
        for file, named in _weight_files(path).items():
            self._read_header(file, named)
        self.fused_experts = any(name.endswith("experts.gate_up_proj") for name in self.shapes)
        self._open: tuple[Path, Any] | None = None
        self._check_against_config()

    def weight_map(self, padded_vocab: int | None = None) -> WeightMap:
        """Say where the numbers of this folder are in a checkpoint with so many rows of the embedding."""
        return weight_map(
            self.settings, self.config, fused_experts=self.fused_experts, padded_vocab=padded_vocab
        )

    def read(self, name: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a box of a tensor, as a view of the file."""
        path = self.file_of[name]
        opened = self._open  # once: another thread may open another file
        if opened is None or opened[0] != path:
            opened = self._open = (path, safe_open(path, framework="pt"))
        part: torch.Tensor = opened[1].get_slice(name)[box(offset, shape)]
        return part

    def _read_header(self, path: Path, named: set[str] | None) -> None:
        """Take over the tensors of one file; `named` are those that an index says it holds."""
        header = _header_of(path)
        for name, (dtype, shape) in header.items():
            if name in self.file_of:
                other = self.file_of[name].name
                raise InputError(f"{name} is in both {other} and {path.name} of {self.path}; fetch it again")
            self.file_of[name] = path
            if name.endswith(COMPUTED):
                self.computed += (name,)
            elif name.startswith(prediction_layers(self.config)):
                self.predicting += (name,)
            elif dtype not in DTYPES:
                raise InputError(
                    f"{name} in {path} is of type {dtype}; weights are taken as {', '.join(DTYPES)}: a "
                    "quantized model cannot be trained, take the one that it was made from"
                )
            else:
                self.shapes[name], self.dtypes[name] = shape, DTYPES[dtype]
        if named is not None and (absent := named - header.keys()):
            raise InputError(
                f"{self.path / INDEX} says that {some(absent)} is in {path.name}, and it is not; fetch "
                "both again"
            )
        if named is not None and (extra := header.keys() - named):
            raise InputError(
                f"{path} holds {some(extra)}, which {INDEX} does not name there; fetch both again"
            )

    def _check_against_config(self) -> None:
        """Refuse tensors that are too many, too few, or of another shape than the configuration says."""
        expected = self.weight_map()
        config = f"{self.path / 'config.json'}{unsaid(self.config)}"
        for name, shape in expected.hf_shapes.items():
            if name in self.shapes and self.shapes[name] != shape:
                raise InputError(
                    f"{name} is {list(self.shapes[name])} in {self.file_of[name]}, but {config} says "
                    f"{list(shape)}; they are not of one model"
                )
        if missing := expected.hf_shapes.keys() - self.shapes.keys():
            raise InputError(f"{self.path} holds no {some(missing)}, which the model of {config} has")
        if unused := self.shapes.keys() - expected.hf_shapes.keys():
            raise InputError(
                f"{self.path} holds {some(unused)}, which the model of {config} does not have; they would be "
                f"lost; correct config.json (num_hidden_layers and {PREDICTION} count layers, and with "
                "tie_word_embeddings there is no lm_head), or take the tensors out"
            )
        for name, places in expected.megatron.index.items():
            found = {self.dtypes[block.hf]: block.hf for blocks in places.values() for block in blocks}
            if len(found) > 1:
                (one, first), (other, second), *_ = found.items()
                raise InputError(
                    f"{first} is {one} and {second} is {other}, but both are parts of {name}, which has one "
                    "type; cast the model to one type first"
                )


def carried_files(folder: Path) -> dict[str, Path]:
    """Return by name the files that go with a folder's weights: configuration, tokenizer, templates, code."""
    return {
        str(path.relative_to(folder)): path
        for path in (*sorted(folder.iterdir()), *sorted((folder / TEMPLATES).glob("*")))
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in NO_WEIGHTS
        and not path.name.endswith(".index.json")
    }


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Put files into a folder under their names there."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _existing(path: Path) -> Path:
    """Return the folder, if it can be that of a whole model."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give that of a Hugging Face model, with its config.json")
    if not (path / "config.json").is_file():
        raise InputError(f"{path} holds no config.json; give the folder of a Hugging Face model")
    if (path / ADAPTER).is_file():
        raise InputError(
            f"{path} holds an adapter ({ADAPTER}), which transformers would add to the weights and "
            "megatron-dynmix would not; merge it into the model first (merge_and_unload of peft), or take it "
            "out of the folder"
        )
    return path


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
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


def some(names: Iterable[str]) -> str:
    """Return the first of many names, and how many more there are."""
    every = sorted(names)
    rest = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + rest
