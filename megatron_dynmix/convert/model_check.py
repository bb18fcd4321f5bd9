"""Whether a converted model answers as the one it was made from: logits on fixed tokens, in float32.

The reference is `transformers`, which reads the Hugging Face folder by itself where it runs the whole model
and weights were not rounded; the other side is our GPT with the weights of the checkpoint. Axes: B rows,
S positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from megatron_dynmix import platform
from megatron_dynmix.config.tree import ModelConfig
from megatron_dynmix.convert.model_cut import build_cut, choose_layers, cut_config, cut_weights
from megatron_dynmix.convert.tensors import Tensors

WHOLE_UP_TO = 2_000_000_000
"""Parameters of a model that is compared as a whole."""
ROWS, POSITIONS = 4, 64
TOLERANCE = 1e-4
"""Largest difference of two logits, of their standard deviation. Other orders of adding in float32 give some
1e-6 in a few layers and 1e-5 in many; two experts or projections in each other's place give 1e-2 and more."""
TIMEOUT_MINUTES = 10.0


class NotCompared(Exception):
    """There is nothing to compare with, or no room for it; the message says why."""


class Different(Exception):
    """The two models cannot be the same; the message says why."""


@dataclass(frozen=True, kw_only=True)
class LogitsVerdict:
    """What a comparison of logits says."""

    passed: bool
    """False if the models differ. True if they were not compared: then `why_not` says why."""
    why_not: str | None = None
    """Why they were not compared, or cannot be the same; None if the numbers below tell."""
    layers: tuple[int, ...] = ()
    """Layers that were run, from 0."""
    num_layers: int = 0
    """Layers of the model."""
    tokens: int = 0
    """Tokens whose logits were compared; none if nothing was."""
    max_difference: float | None = None
    """Largest difference of two logits."""
    tolerance: float | None = None
    """What it may be: `TOLERANCE` times the standard deviation of the reference's logits."""
    top1_agreement: float | None = None
    """Share of tokens after which both expect the same token most."""
    experts_reached: float | None = None
    """Share of the experts of those layers that a token went to: the others were not compared."""
    rounded: bool = False
    """Whether the reference was given the rounded weights too."""

    @property
    def compared(self) -> bool:
        """Whether logits were compared at all."""
        return self.max_difference is not None

    def describe(self) -> str:
        """One line for people."""
        if not self.compared:
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
    *,
    rounded: bool = False,
    limit: int = WHOLE_UP_TO,
    memory: int | None = None,
) -> LogitsVerdict:
    """Run both models on the same tokens, one after the other, and compare.

    A model of more than `limit` parameters is represented by its first, its middle and its last layer, with
    embedding and output layer.

    Args:
        hf_folder: the Hugging Face model; none of its own code is run.
        weights: the tensors of that folder.
        rounded: whether they are not as the folder has them, but rounded to another type; the reference is
            then given these, and reads nothing by itself.
        checkpoint: the tensors of the Megatron checkpoint.
        model: what the checkpoint is a model of.
        limit: parameters of a model that is run as a whole.
        memory: bytes that may be used; what is free if not given.

    Returns:
        The verdict; whatever goes wrong on the way is a reason in it.

    """
    found: dict[str, Any] = {}
    try:
        config = _reference_config(hf_folder)
        _check_sizes(config, model)
        device = platform.start().device
        free = _free_bytes(device) if memory is None else memory
        layers = choose_layers(weights.shapes, limit=limit, memory=free)
        if not layers:
            raise NotCompared(
                f"one layer with embedding and output layer does not fit in the {free / 2**30:.1f} GiB of "
                "memory that are free; compare on a larger machine"
            )
        found = {"layers": layers, "num_layers": config.num_hidden_layers, "rounded": rounded}
        tokens_BS = fixed_tokens(config.vocab_size, int(config.max_position_embeddings))
        itself = len(layers) == config.num_hidden_layers and not rounded
        given = None if itself else cut_weights(weights, layers)
        reference_BSV = _reference_logits(hf_folder, given, config, layers, tokens_BS.to(device))
        ours_BSV, reached = _our_logits(checkpoint, model, layers, tokens_BS.to(device))
        return _verdict(reference_BSV, ours_BSV, {**found, "experts_reached": reached})
    except NotCompared as why:
        return LogitsVerdict(passed=True, why_not=str(why), **found)
    except Different as why:
        return LogitsVerdict(passed=False, why_not=str(why), **found)


def fixed_tokens(vocab_size: int, max_positions: int) -> torch.Tensor:
    """`[B, S]`: drawn once and for all from the whole vocabulary, its first and last token among them."""
    generator = torch.Generator().manual_seed(20240617)
    positions = min(POSITIONS, max_positions)
    tokens_BS = torch.randint(vocab_size, (ROWS, positions), generator=generator)
    tokens_BS[0, 0], tokens_BS[-1, 0] = 0, vocab_size - 1
    return tokens_BS


def _reference_config(hf_folder: Path) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
    from transformers import __version__ as version

    kind = PretrainedConfig.get_config_dict(hf_folder, local_files_only=True)[0].get("model_type")
    try:
        config = AutoConfig.from_pretrained(hf_folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # other people's code reads a file: whatever it says is a reason
        from transformers import CONFIG_MAPPING

        if kind not in CONFIG_MAPPING:
            raise NotCompared(
                f"transformers {version} has no model of type {kind}, and code of the folder is not run"
            ) from None
        raise Different(f"transformers {version} cannot read config.json: {_first_line(error)}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotCompared(f"transformers {version} has no language model of type {kind}")
    return config


def _check_sizes(config: Any, model: ModelConfig) -> None:
    for what, there, here in (
        ("tokens", config.vocab_size, model.vocab_size),
        ("layers", config.num_hidden_layers, model.megatron["num_layers"]),
    ):
        if there != here:
            raise Different(f"the model has {there} {what} by its config.json and {here} in the checkpoint")


def _reference_logits(
    hf_folder: Path,
    given: dict[str, torch.Tensor] | None,
    config: Any,
    layers: tuple[int, ...],
    tokens_BS: torch.Tensor,
) -> torch.Tensor:
    """`[B, S, V]` of `transformers`, on the CPU, with the weights given or, if none are, those it reads."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging as hf_logging

    config.dtype = torch.float32  # or it would compute in the type that the folder is in
    weights_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        if given is None:
            model, said = kind.from_pretrained(
                hf_folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        else:
            cut = cut_config(config, layers)
            model, said = kind.from_pretrained(None, config=cut, state_dict=given, output_loading_info=True)
        if said["missing_keys"]:
            raise Different(
                f"transformers misses {', '.join(sorted(said['missing_keys'])[:3])} in {hf_folder}"
            )
        if hasattr(
            model, "set_experts_implementation"
        ):  # its default asks for widths that divide by 16 bytes
            model.set_experts_implementation("eager")
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


def _our_logits(
    checkpoint: Tensors, model: ModelConfig, layers: tuple[int, ...], tokens_BS: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """`[B, S, V]` of our GPT, on the CPU, and the share of its experts that the tokens went to."""
    gc.collect()  # the reference, which holds cycles, before the next model
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    with one_rank(), torch.no_grad():
        try:
            gpt = build_cut(model, checkpoint, layers).to(tokens_BS.device)
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


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Megatron-Core's process groups for a model on one rank; those made here are gone again afterwards."""
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


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
