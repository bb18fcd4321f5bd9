"""The logits of `transformers`, with which those of a converted model are compared; on the CPU, in float32.

It reads a folder by itself where it runs the whole model of one that holds nothing else, as plain floats;
else it is given weights. None of a folder's own code is run.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dynmix.checkpoint.tensors import Tensors
from megatron_dynmix.config.hugging_face import text_of
from megatron_dynmix.config.quantization import WORD
from megatron_dynmix.families import known_as
from megatron_dynmix.files import read_object

HF_LAYER = re.compile(r"(?P<before>(?:.*\.)?layers\.)(?P<layer>\d+)(?P<after>\..*)")


class NotCompared(Exception):
    """There is nothing to compare with, or no room for it; the message says why."""


class Different(Exception):
    """The two models cannot be the same; the message says why."""


def reference_config(hf_folder: Path) -> Any:
    """Return the `PretrainedConfig` of a folder whose language model `transformers` has."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
    from transformers import __version__ as version

    whole = PretrainedConfig.get_config_dict(hf_folder, local_files_only=True)[0]
    text = {name: value for name, value in text_of(whole).items() if name != WORD}
    kind = known_as(text.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise NotCompared(
            f"transformers {version} has no model of type {kind}, and code of the folder is not run"
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict({**text, "model_type": kind})
    except Exception as error:  # other people's code reads a file: whatever it says is a reason
        raise Different(f"transformers {version} cannot read config.json: {_first_line(error)}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotCompared(f"transformers {version} has no language model of type {kind}")
    if getattr(config, "head_dim", 0) is None:  # which transformers 5 takes for a number if YaRN stretches it
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def reads_itself(hf_folder: Path) -> bool:
    """Whether `transformers` reads a folder's weights as those of a language model, as they are trained."""
    config = read_object(hf_folder / "config.json", "fetch it again")
    itself = text_of(config) is config and WORD not in config
    return itself and known_as(config.get("model_type")) == config.get("model_type")


def reference_logits(
    hf_folder: Path,
    config: Any,
    given: dict[str, torch.Tensor] | None,
    layers: tuple[int, ...],
    tokens_BS: torch.Tensor,
    rounding: tuple[torch.dtype, set[str]] | None,
) -> torch.Tensor:
    """Return `[B, S, V]` of `transformers`, on the CPU, with the weights given or else those it reads.

    `rounding` is the type that they are rounded to, and names of tensors that are not.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging as hf_logging

    config.dtype = torch.float32  # or it would compute in the type that the folder is in
    options = {"config": config, "local_files_only": True, "use_safetensors": True}
    if given is not None:
        options = {"config": _cut_config(config, layers), "state_dict": given}
    weights_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model, said = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            hf_folder if given is None else None, output_loading_info=True, **options
        )
        if missing := sorted(said["missing_keys"])[:3]:
            raise Different(f"transformers misses {', '.join(missing)} in {hf_folder}")
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # its default asks for widths that divide by 16 bytes
        if rounding is not None:
            _round(model, *rounding)
        with torch.no_grad():
            logits_BSV = model.float().eval().to(tokens_BS.device)(tokens_BS, use_cache=False).logits
    except Different:
        raise
    except Exception as error:  # as above
        raise Different(f"transformers cannot run {hf_folder}: {_first_line(error)}") from None
    finally:
        if weights_bar:
            hf_logging.enable_progress_bar()
    return logits_BSV.float().cpu()


@torch.no_grad()
def _round(model: Any, dtype: torch.dtype, float32: set[str]) -> None:
    """Round a model of `transformers` as if it were loaded in that type."""
    kept = float32 | set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.copy_(tensor.to(dtype))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _cut_config(config: Any, layers: Sequence[int]) -> Any:
    """Return the `PretrainedConfig` of a model that has some of another's layers."""
    cut, total = copy.deepcopy(config), config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total and name.endswith("layer_types"):
            setattr(cut, name, [value[layer] for layer in layers])
    step = getattr(config, "decoder_sparse_step", None)
    if step is not None:
        without = set(getattr(config, "mlp_only_layers", None) or ())
        dense = [layer in without or (layer + 1) % step != 0 for layer in layers]
        cut.mlp_only_layers = [number for number, is_dense in enumerate(dense) if is_dense]
        cut.decoder_sparse_step = 1
    if getattr(config, "first_k_dense_replace", None) is not None:
        cut.first_k_dense_replace = sum(layer < config.first_k_dense_replace for layer in layers)
    cut.num_hidden_layers = len(layers)
    return cut


def cut_weights(folder: Tensors, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Read the weights of those layers, renumbered, and of what is outside all layers."""
    weights = {}
    for name, shape in folder.shapes.items():
        new_name = name
        if match := HF_LAYER.fullmatch(name):
            layer = int(match["layer"])
            if layer not in layers:
                continue
            new_name = f"{match['before']}{layers.index(layer)}{match['after']}"
        weights[new_name] = folder.read(name, (0,) * len(shape), shape)
    return weights
