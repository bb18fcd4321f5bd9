"""A folder of a Hugging Face model: its configuration, and its weights read box by box from safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.config.hugging_face import read_config, text_of
from megatron_dynmix.config.hugging_face_defaults import unsaid
from megatron_dynmix.config.quantization import quantization_of
from megatron_dynmix.convert.aside import HEAD, PREFIXES, in_model, prefix_of
from megatron_dynmix.convert.interleaved import as_families
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.prediction import PREDICTION, prediction_layers
from megatron_dynmix.convert.quantized import Dequantized, refuse_types
from megatron_dynmix.convert.tensors import Named, boxes_of, read_bytes
from megatron_dynmix.convert.weight_files import WeightFiles, some, weight_files
from megatron_dynmix.convert.weight_map import WeightMap
from megatron_dynmix.errors import InputError
from megatron_dynmix.families.names import UNTIED

COMPUTED = (".rotary_emb.inv_freq", ".attn.mask", ".attn.cum_weight")
"""Ends of the names of tensors that old folders hold though nothing in them was learned."""
EMBEDDED = "model.embed_tokens.weight"

ADAPTER = "adapter_config.json"
TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps chat templates beside the first."""
NO_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}


class HuggingFaceFolder:
    """The weights of a folder, checked when it is opened; of them, only headers are read then.

    Its tensors are those of the language model, quantized ones as the plain floats that they stand for, under
    the names that they have in a folder of nothing else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        whole, self.settings = read_config(_existing(path) / "config.json", "fetch it again")
        self.config = text_of(whole)
        """What config.json says of the language model."""
        self.quantization = quantization_of(self.config)
        held = Dequantized(WeightFiles(weight_files(path)), self.quantization)
        prefix = "" if self.config is whole else prefix_of(held.shapes)
        if prefix is None:
            raise InputError(
                f"{path / 'config.json'} has a text_config, but no tensor begins with "
                f"{' or '.join(PREFIXES)}; its language model cannot be told from the rest"
            )
        self.prefix: str = prefix
        """One of `PREFIXES` in a multimodal model, else nothing."""
        self.computed: tuple[str, ...] = ()
        """Tensors in which nothing was learned, or that are there twice; they are left out."""
        names, beside = self._sorted(held)
        self.aside: Tensors = Named(held, {name: name for name in beside})
        """Tensors that are no part of the model here, by their names in the folder."""
        refuse_types(held, [*names.values()])
        text = as_families(Named(held, names), self.config)
        self.shapes, self.dtypes, self.read = text.shapes, text.dtypes, text.read
        self.file_of = {name: held.file_of[there] for name, there in names.items()}
        self.fused_experts = any(name.endswith("experts.gate_up_proj") for name in self.shapes)
        self._check_against_config()

    def weight_map(self, padded_vocab: int | None = None) -> WeightMap:
        """Say where the numbers of this folder are in a checkpoint with so many rows of the embedding."""
        return weight_map(
            self.settings, self.config, fused_experts=self.fused_experts, padded_vocab=padded_vocab
        )

    def _sorted(self, held: Dequantized) -> tuple[dict[str, str], list[str]]:
        """Return the tensors of the model, name -> that in the folder, and what is kept aside."""
        names: dict[str, str] = {}
        beside: list[str] = []
        predicting = prediction_layers(self.config)
        for there in held.shapes:
            name = in_model(there, self.prefix)
            if name is None or name.startswith(predicting):
                beside.append(there)
            elif name.endswith(COMPUTED):
                self.computed += (there,)
            else:
                names[name] = there
        if HEAD in names and not self.settings[UNTIED]:
            self.computed += (names.pop(HEAD),)
            _refuse_another_head(held, self.computed[-1], names.get(EMBEDDED), self.path)
        return names, beside

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
                f"lost; correct config.json (num_hidden_layers and {PREDICTION} count layers), or take the "
                "tensors out"
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


def _refuse_another_head(held: Dequantized, head: str, embedding: str | None, path: Path) -> None:
    """Refuse an output layer that is not the embedding once more, though config.json says that it is."""
    if embedding is not None and held.shapes[head] == held.shapes[embedding]:
        parts = ((part, part._replace(name=embedding)) for part in boxes_of(held, head))
        if all(np.array_equal(read_bytes(held, one), read_bytes(held, other)) for one, other in parts):
            return
    raise InputError(
        f"{path} holds {head}, which is not {embedding} once more, but config.json says tie_word_embeddings "
        "true: one of them would be lost; set it to false to keep both, or take the output layer out"
    )
