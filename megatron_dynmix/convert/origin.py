"""What goes beside the weights when a checkpoint becomes a Hugging Face folder: its origin says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.config import rotary
from megatron_dynmix.config.hugging_face import (
    PLAIN,
    TEXT,
    hugging_face_config,
    read_config,
    text_of,
)
from megatron_dynmix.config.model_defaults import model_defaults
from megatron_dynmix.config.presets import has_tokenizer, other_shape
from megatron_dynmix.config.quantization import WORD, quantization_of
from megatron_dynmix.config.run_config import ModelConfig
from megatron_dynmix.convert import aside
from megatron_dynmix.convert.hf_folder import TEMPLATES, HuggingFaceFolder, carried_files, copy_files
from megatron_dynmix.convert.prediction import PREDICTION, prediction_layers
from megatron_dynmix.convert.tensors import Named
from megatron_dynmix.convert.weight_files import WeightFiles, write_shard
from megatron_dynmix.data.tokenizer.load import load_tokenizer
from megatron_dynmix.errors import InputError

CONFIG = "config.json"
CONVERTED = "hugging_face"
"""Folder of a converted checkpoint that holds all of its origin but the weights."""
CONVERSION = "conversion.json"
"""File of a converted checkpoint that says how its origin was laid out."""
TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "chat_template", "added_tokens", TEMPLATES)
"""What the names of a tokenizer's files begin with."""
NO_TOKENIZER = "no tokenizer came with the model: put its files into the folder"
NO_PREDICTION = (
    "config.json of the model that it came from counts {count} layers for multi-token prediction, which are "
    f"not there: the export has none, and {PREDICTION} is 0 in its config.json"
)
NOTHING = Named(WeightFiles({}), {})


@dataclass(frozen=True)
class Origin:
    """The Hugging Face model that a checkpoint is of."""

    config: Mapping[str, Any]
    """What config.json says, with what training has changed of the model."""
    files: Mapping[str, Path]
    """Name -> file that goes with the weights: tokenizer, generation settings, chat template."""
    fused_experts: bool
    """Whether the origin has a layer's experts in one tensor."""
    prefix: str = ""
    """What names of the language model begin with in a multimodal one: one of `aside.PREFIXES`."""
    aside: Tensors = NOTHING
    """Tensors that are no part of the model here, by their names in the folder."""
    notes: tuple[str, ...] = ()
    """What a reader must know."""

    @property
    def text(self) -> Mapping[str, Any]:
        """What config.json says of the language model."""
        return text_of(self.config)


def origin_of(config: Mapping[str, Any], checkpoint: Path, given: Path | None) -> Origin:
    """Find out what a checkpoint, an `iter_*` folder with its run's configuration, is of.

    The folder with a config.json that is `given` is taken, or else the one that the model came from.
    """
    settings, data = config["model"], config.get("data", {})
    folder = given if given is not None else _folder(config, checkpoint)
    tokenizer: dict[str, Path] = {}
    if data.get("tokenizer") is not None and has_tokenizer(Path(data["tokenizer"])):
        beside = carried_files(Path(data["tokenizer"]))
        tokenizer = {name: file for name, file in beside.items() if _is_tokenizer(name)}
    if folder is None:
        written = hugging_face_config(settings)
        if not tokenizer:
            return Origin(written, {}, fused_experts=False, notes=(NO_TOKENIZER,))
        remote = bool(data.get("trust_remote_code", False))
        eos_id = load_tokenizer(data["tokenizer"], trust_remote_code=remote).eos_id
        return Origin({**written, "eos_token_id": eos_id}, tokenizer, fused_experts=False)
    written, theirs = read_config(folder / CONFIG, "give a folder with a config.json")
    if differing := other_shape(theirs, settings):
        changes = ", ".join(f"{name} {settings.get(name)} (there {theirs.get(name)})" for name in differing)
        raise InputError(
            f"{checkpoint} is not of the model of {folder}: {changes}; give the folder it came from with "
            "--hf-config"
        )
    files = carried_files(folder)
    del files[CONFIG]
    if tokenizer:
        files = {name: path for name, path in files.items() if not _is_tokenizer(name)} | tokenizer
    notes = [] if any(map(_is_tokenizer, files)) else [NO_TOKENIZER]
    fused, prefix, kept = _laid_out(folder)
    text = dict(text_of(written))
    predicting = prediction_layers(text)
    if predicting and not any(name.startswith(predicting) for name in _in_model(kept, prefix)):
        notes.append(NO_PREDICTION.format(count=text[PREDICTION]))
        text[PREDICTION] = 0
    if kept.shapes:
        notes.append(f"written as they came: {aside.aside_text(kept.shapes)}")
    elif text_of(written) is not written:
        raise InputError(
            f"{folder} is of a multimodal model, and all but its language model is not there; give the "
            "folder with all of its weights with --hf-config"
        )
    if quantization := quantization_of(text):
        notes.append(
            f"the weights came as {quantization.describe()}: those of the export are not quantized, and its "
            f"config.json has no {WORD}"
        )
        del text[WORD]
    text = _with_changes(text, theirs, settings)
    whole = text
    if text_of(written) is not written:
        whole = {name: value for name, value in written.items() if name != WORD}
        elsewhere = written.keys() - written[TEXT].keys()  # what `text_of` has added
        whole[TEXT] = {name: value for name, value in text.items() if name not in elsewhere}
    return Origin(whole, files, fused, prefix, kept, tuple(notes))


def _in_model(tensors: Tensors, prefix: str) -> list[str]:
    """Return what those tensors of a folder that are the language model's are called there."""
    names = (aside.in_model(name, prefix) for name in tensors.shapes)
    return [name for name in names if name is not None]


def keep_origin_of(folder: HuggingFaceFolder, root: Path, *, dtype: str | None) -> None:
    """Keep in `root`, the parent of `iter_*`, what a folder holds beside the model, and how it was laid out.

    `dtype` is the type that the weights were cast to, by its name in torch; None if they were not.
    """
    copy_files(carried_files(folder.path), root / CONVERTED)
    origin = {
        "source": str(folder.path.resolve()),
        "fused_experts": folder.fused_experts,
        "prefix": folder.prefix,
        "dtype": dtype,
    }
    if folder.aside.shapes:
        write_shard(folder.aside, folder.aside.shapes, root / aside.FILE)
    (root / CONVERSION).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def model_of(settings: Mapping[str, Any]) -> ModelConfig:
    """Make the `model` section of one mapping: our fields, and those of `TransformerConfig` beside them."""
    own = {field.name for field in fields(ModelConfig)} - {"megatron"}
    return ModelConfig(
        **{name: value for name, value in settings.items() if name in own},
        megatron={name: value for name, value in settings.items() if name not in own},
    )


def _folder(config: Mapping[str, Any], checkpoint: Path) -> Path | None:
    """Return the folder that a checkpoint came from, if it came from one."""
    beside = checkpoint.parent / CONVERTED
    if (beside / CONFIG).is_file():
        return beside
    pretrained = config.get("checkpoint", {}).get("pretrained_checkpoint")
    if pretrained is not None and (Path(pretrained) / CONVERTED / CONFIG).is_file():
        return Path(pretrained) / CONVERTED
    load_hf = config["model"].get("load_hf")
    if load_hf is not None and not (Path(load_hf) / CONFIG).is_file():
        raise InputError(
            f"{checkpoint} was trained from {load_hf}, which is not there any more; give --hf-config DIR, a "
            "folder with its config.json and tokenizer"
        )
    return None if load_hf is None else Path(load_hf)


def _with_changes(
    written: Mapping[str, Any], theirs: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the origin's config.json, changed where training was with other settings."""
    before = {**{name: model_defaults().get(name) for name in (*PLAIN, *rotary.SETTINGS)}, **theirs}
    after = {name: settings.get(name, value) for name, value in before.items()}
    if after == before:
        return dict(written)
    was, now = hugging_face_config(theirs), hugging_face_config(after)
    changed = {name: value for name, value in now.items() if was.get(name) != value}
    kept = dict(written)
    if any(was.get(name) != now.get(name) for name in rotary.WORDS):
        # said once: of two ways to say it, transformers would take the other
        kept = {name: value for name, value in written.items() if name not in rotary.WORDS}
        changed |= {name: now[name] for name in rotary.WORDS if name in now}
    return kept | changed


def _laid_out(folder: Path) -> tuple[bool, str, Tensors]:
    """Return what `Origin` says of the tensors, by the weights or by the conversion that read them."""
    path = folder.parent / CONVERSION
    if path.is_file():
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            fused, prefix = bool(said["fused_experts"]), str(said.get("prefix", ""))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} does not say how the experts were laid out ({error!r}); put it back from a copy, or "
                "take it out: there will be a tensor for each expert"
            ) from None
        kept = folder.parent / aside.FILE
        return fused, prefix, WeightFiles({kept: None}) if kept.is_file() else NOTHING
    if not any(folder.glob("*.safetensors")):
        return False, "", NOTHING
    opened = HuggingFaceFolder(folder)
    return opened.fused_experts, opened.prefix, opened.aside


def _is_tokenizer(name: str) -> bool:
    return name.startswith(TOKENIZER)
