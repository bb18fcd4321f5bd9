"""Whether a converted model answers as the one it was made from: logits on fixed tokens, in float32.

The reference is `transformers` (`reference.py`), the other side our GPT with the weights of the checkpoint.
Of a model too large to be run whole, both run the same few layers, renumbered. Axes: B rows, S positions, V
vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter

from megatron_dynmix import platform
from megatron_dynmix.checkpoint.tensors import Tensors, own_slices
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.megatron import STAGE_SETTINGS, moe_layers, transformer_config
from megatron_dynmix.config.run_config import ModelConfig
from megatron_dynmix.convert.interleaved import as_published
from megatron_dynmix.convert.reference import (
    HF_LAYER,
    Different,
    NotCompared,
    cut_weights,
    reads_itself,
    reference_config,
    reference_logits,
)
from megatron_dynmix.model.gpt import build_gpt

WHOLE_UP_TO = 2_000_000_000
"""Parameters of a model that is compared as a whole."""
ROWS, POSITIONS = 4, 64
TOLERANCE = 1e-4
"""Largest difference of two logits, of their standard deviation. Other orders of adding in float32 give some
1e-6 in a few layers and 1e-5 in many; two experts or projections in each other's place give 1e-2 and more."""
FLOAT_BYTES = 4
HEADROOM = 2.25
"""Memory that a model takes while it is loaded and run, of its weights in float32; measured: 1.9 to 2.2."""
TIMEOUT_MINUTES = 10.0
STACKED, APART = "decoder.layers.", re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<name>.*)")
NOT_LEARNED: Mapping[str, Any] = {
    # nothing of what a model answers follows from these but whether tokens are dropped or noise is added
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_input_jitter_eps": None,
    # these want kernels that not every machine has, or precisions that are not compared here
    "moe_grouped_gemm": False,
    "moe_use_legacy_grouped_gemm": False,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_fusion": False,
    "apply_rope_fusion": False,
    "recompute_granularity": None,
    "fp8": None,
    "fp4": None,
}
"""Settings that say how a model is trained, not what it is, and what they are for a comparison."""


@dataclass(frozen=True, kw_only=True)
class LogitsVerdict:
    """What a comparison of logits says."""

    passed: bool
    """False if the models differ, True also if they were not compared."""
    why_not: str | None = None
    """Why they were not compared, or cannot be the same; None if the numbers below tell."""
    layers: tuple[int, ...] = ()
    """Those that were run, from 0."""
    num_layers: int = 0
    tokens: int = 0
    max_difference: float | None = None
    """Largest difference of two logits."""
    tolerance: float | None = None
    """`TOLERANCE` times the standard deviation of the reference's logits."""
    top1_agreement: float | None = None
    """Share of tokens after which both expect the same token most."""
    experts_reached: float | None = None
    """Share of the experts of those layers that a token went to: the others were not compared."""
    rounded: bool = False
    """Whether the reference rounded its weights too."""

    def describe(self) -> str:
        """Return one line for people."""
        if self.why_not is not None:
            return f"logits not compared: {self.why_not}" if self.passed else f"FAILED: {self.why_not}"
        which = "all" if len(self.layers) == self.num_layers else ", ".join(map(str, self.layers)) + " of the"
        return (
            f"{'equal' if self.passed else 'FAILED'}: logits of {self.tokens} tokens through {which} "
            f"{self.num_layers} layers differ by at most {self.max_difference:.1e} "
            f"(allowed {self.tolerance:.1e}), same most likely token after {self.top1_agreement:.1%}, "
            f"{self.experts_reached:.1%} of their experts reached"
            + ("; both with the rounded weights" if self.rounded else "")
        )


def compare_logits(
    hf_folder: Path,
    weights: Tensors,
    checkpoint: Tensors,
    model: ModelConfig,
    dtype: torch.dtype | None = None,
    float32: Collection[str] = (),
    *,
    limit: int = WHOLE_UP_TO,
    memory: int | None = None,
) -> LogitsVerdict:
    """Run both models on the same tokens, one after the other, and compare.

    Whatever goes wrong on the way is a reason in the verdict. None of the folder's own code is run. Its
    `weights` are given to the reference if the model has more parameters than `limit` or wants more than
    `memory` bytes; see `choose_layers`. If those of the checkpoint were cast to `dtype`, the reference rounds
    its own to that type, but not what `transformers` keeps in float32, nor the tensors that `float32` names.
    """
    found: dict[str, Any] = {}
    try:
        config = reference_config(hf_folder)
        for what, there, here in (
            ("tokens", config.vocab_size, model.vocab_size),
            ("layers", config.num_hidden_layers, model.megatron["num_layers"]),
        ):
            if there != here:
                raise Different(
                    f"the model has {there} {what} by its config.json and {here} in the checkpoint"
                )
        device = platform.start().device
        if memory is None:
            on_cuda = device.type == "cuda"
            memory = torch.cuda.mem_get_info(device)[0] if on_cuda else psutil.virtual_memory().available
        layers = choose_layers(weights.shapes, limit=limit, memory=memory)
        if not layers:
            raise NotCompared(
                f"one layer with embedding and output layer does not fit in the {memory / 2**30:.1f} GiB of "
                "memory that are free; compare on a larger machine"
            )
        held = {weights.dtypes[name] for name in weights.shapes if name not in float32}
        rounded = dtype is not None and any(torch.promote_types(dtype, kind) != dtype for kind in held)
        found = {"layers": layers, "num_layers": config.num_hidden_layers, "rounded": rounded}
        tokens_BS = fixed_tokens(config.vocab_size, int(config.max_position_embeddings)).to(device)
        whole = len(layers) == config.num_hidden_layers
        given = (
            None
            if whole and reads_itself(hf_folder)
            else cut_weights(as_published(weights, config.to_dict()), layers)
        )
        rounding = (dtype, {name.rpartition(".")[2] for name in float32}) if rounded else None
        reference_BSV = reference_logits(hf_folder, config, given, layers, tokens_BS, rounding)
        del given
        ours_BSV, reached = _our_logits(checkpoint, model, layers, tokens_BS)
        return _verdict(reference_BSV, ours_BSV, {**found, "experts_reached": reached})
    except NotCompared as why:
        return LogitsVerdict(passed=True, why_not=str(why), **found)
    except Different as why:
        return LogitsVerdict(passed=False, why_not=str(why), **found)


def choose_layers(shapes: Mapping[str, tuple[int, ...]], *, limit: int, memory: int) -> tuple[int, ...]:
    """Return the numbers, from 0, of the layers that are run, always with embedding and output layer.

    They are all layers of a model of up to `limit` parameters, else the first, the middle and the last; fewer
    of those if so many bytes of memory do not hold them; none if they do not even hold one.
    """
    fixed, layer_L = 0, dict[int, int]()
    for name, shape in shapes.items():
        if match := HF_LAYER.fullmatch(name):
            number = int(match["layer"])
            layer_L[number] = layer_L.get(number, 0) + math.prod(shape)
        else:
            fixed += math.prod(shape)
    every, last = tuple(sorted(layer_L)), max(layer_L)
    candidates = [tuple(sorted({0, last // 2, last})), tuple(sorted({0, last})), (last,)]
    if fixed + sum(layer_L.values()) <= limit:
        candidates.insert(0, every)
    for layers in candidates:
        parameters = fixed + sum(layer_L[layer] for layer in layers)
        if parameters * FLOAT_BYTES * HEADROOM <= memory:
            return layers
    return ()


def fixed_tokens(vocab_size: int, max_positions: int) -> torch.Tensor:
    """Draw `[B, S]` from the whole vocabulary, the same every time, its first and last token among them."""
    generator = torch.Generator().manual_seed(20240617)
    positions = min(POSITIONS, max_positions)
    tokens_BS = torch.randint(vocab_size, (ROWS, positions), generator=generator)
    tokens_BS[0, 0], tokens_BS[-1, 0] = 0, vocab_size - 1
    return tokens_BS


def _verdict(reference_BSV: torch.Tensor, ours_BSV: torch.Tensor, found: dict[str, Any]) -> LogitsVerdict:
    for whose, logits_BSV in (("transformers", reference_BSV), ("our", ours_BSV)):
        if not logits_BSV.isfinite().all():
            raise Different(f"{whose} logits are not finite: weights are NaN or infinite, or overflow")
    tolerance = TOLERANCE * float(reference_BSV.std())
    max_difference = float((reference_BSV - ours_BSV).abs().max())
    agreement = (reference_BSV.argmax(-1) == ours_BSV.argmax(-1)).float().mean()
    return LogitsVerdict(
        passed=max_difference <= tolerance,
        tokens=reference_BSV.shape[0] * reference_BSV.shape[1],
        max_difference=max_difference,
        tolerance=tolerance,
        top1_agreement=float(agreement),
        **found,
    )


def _our_logits(
    checkpoint: Tensors, model: ModelConfig, layers: tuple[int, ...], tokens_BS: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return `[B, S, V]` of our GPT, on the CPU, and the share of its experts that the tokens went to."""
    gc.collect()  # the reference, which holds cycles, before the next model
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    with one_rank(), torch.no_grad():
        try:
            gpt = _build_cut(model, checkpoint, layers).to(tokens_BS.device)
        except KeyError as error:
            raise Different(f"the checkpoint has no {error}") from None
        except ValueError as error:
            raise Different(f"the checkpoint does not fit the model: {error}") from None
        reached: list[torch.Tensor] = []
        for module in gpt.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(lambda _, given, chosen: reached.append(chosen[1].any(dim=0)))
        logits_BSV: torch.Tensor = gpt(tokens_BS, positions_BS, None)
    share = float(torch.cat(reached).float().mean()) if reached else 1.0
    return logits_BSV.float().cpu(), share


def _build_cut(model: ModelConfig, checkpoint: Tensors, layers: Sequence[int]) -> GPTModel:
    """Build our GPT with some of a checkpoint's layers: on one rank, in float32, its vocabulary not padded.

    Transformer Engine is not used: it multiplies matrices of float32 in TF32. A tensor that the checkpoint
    does not have is a `KeyError`, one that is too small a `ValueError`.
    """
    settings = {name: value for name, value in model.megatron.items() if name not in STAGE_SETTINGS}
    if settings.get("moe_layer_freq", 1) != 1:
        # layers that differ; a list keeps the names that such layers have in checkpoints
        routed = moe_layers(SimpleNamespace(**settings))
        settings["moe_layer_freq"] = [int(layer in routed) for layer in layers]
    if isinstance(windowed := settings.get("window_attn_skip_freq"), list | tuple):
        settings["window_attn_skip_freq"] = [windowed[layer] for layer in layers]
    settings |= {name: value for name, value in NOT_LEARNED.items() if name in settings}
    settings |= {"num_layers": len(layers), "perform_initialization": False}
    config = RunConfig(model=dataclasses.replace(model, make_vocab_size_divisible_by=1, megatron=settings))
    gpt = build_gpt(config, transformer_config(config), transformer_engine=False)
    for tensor in own_slices([gpt]):
        tensor.data.copy_(_read(checkpoint, tensor, layers))
    return gpt.eval()


def _read(checkpoint: Tensors, tensor: ShardedTensor, layers: Sequence[int]) -> torch.Tensor:
    """Read what a tensor of the model with those layers holds."""
    name, offset = tensor.key, tensor.global_offset
    if match := APART.fullmatch(name):
        name = f"{STACKED}{layers[int(match['layer'])]}.{match['name']}"
    elif name.startswith(STACKED):
        offset = (layers[offset[0]], *offset[1:])
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    there = checkpoint.shapes[name]
    if any(start + size > length for start, size, length in zip(offset, shape, there, strict=True)):
        raise ValueError(f"{name} is {list(there)}, too small for {list(shape)} at {list(offset)}")
    return checkpoint.read(name, offset, shape).reshape(tensor.local_shape)


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Give a model on one rank Megatron-Core's process groups; those made here are gone again afterwards."""
    had_job = torch.distributed.is_initialized()
    platform.init_process_group(TIMEOUT_MINUTES)
    had_groups = parallel_state.model_parallel_is_initialized()
    try:
        if torch.distributed.get_world_size() > 1:
            raise NotCompared("a job of several ranks is running; `megatron-dynmix convert` compares on one")
        if not had_groups:
            parallel_state.initialize_model_parallel()
        yield
    finally:
        if not had_groups:
            parallel_state.destroy_model_parallel()
        if not had_job:
            torch.distributed.destroy_process_group()
