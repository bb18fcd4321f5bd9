"""A run that starts from the weights of a Hugging Face folder (`model.load_hf`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.megatron import padded_vocab_size
from megatron_dynmix.config.presets import other_shape
from megatron_dynmix.convert.aside import aside_text
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.tensors import Seen, as_megatron
from megatron_dynmix.errors import InputError, TrainingStopped
from megatron_dynmix.job.agreement import RankFailure, on_rank_0, together


def folder_for(folder: Path, config: RunConfig) -> HuggingFaceFolder:
    """Open a Hugging Face folder that has the weights of this model, by names, types and shapes."""
    source = HuggingFaceFolder(folder)
    model = config.model.flat()
    if differing := other_shape(source.settings, model):
        changes = ", ".join(
            f"{name} {source.settings.get(name)} (now {model.get(name)})" for name in differing
        )
        raise InputError(f"{folder} holds another model: {changes}; give the settings of its config.json")
    return source


def weights_of(source: HuggingFaceFolder, config: RunConfig) -> Seen:
    """Return the weights of a folder, laid out as in a checkpoint; each is read when it is asked for."""
    return as_megatron(source, source.weight_map(padded_vocab_size(config)))


def check_load_hf(config: RunConfig) -> None:
    """Refuse, as `InputError`, a Hugging Face folder that a fresh run cannot start from."""
    if config.model.load_hf is None:
        return
    if config.checkpoint.pretrained_checkpoint is not None:
        raise InputError(
            f"model.load_hf ({config.model.load_hf}) and checkpoint.pretrained_checkpoint "
            f"({config.checkpoint.pretrained_checkpoint}) are both given, but a run starts from the weights "
            "of one; leave out the other"
        )
    folder_for(Path(config.model.load_hf), config)


def load_hugging_face(config: RunConfig, load: Callable[[Tensors], None], say: Callable[[str], None]) -> None:
    """Have the weights of `model.load_hf` loaded, by each rank its own slices of them."""
    assert config.model.load_hf is not None, "asked before"
    folder = Path(config.model.load_hf)
    say(f" loading weights from {folder}")
    try:
        with together():
            source = folder_for(folder, config)
        if source.aside.shapes:
            say(f" not loaded: {aside_text(source.aside.shapes)}")
        load(weights_of(source, config))
    except RankFailure as failure:
        text = f"the weights of {folder} could not be read: {failure}"
        raise TrainingStopped(on_rank_0(text)) from None
    say(f" successfully loaded weights from {folder}")
