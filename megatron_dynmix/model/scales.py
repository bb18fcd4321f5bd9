"""What a model multiplies by numbers that are not learnt: embedding, residual branches, logits (Granite).

Axes: S positions, B rows, H hidden size, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_dynmix.config.run_config import ModelConfig

WithBias = tuple[torch.Tensor, torch.Tensor | None]
"""What attention or an MLP gives, `[S, B, H]`, and a bias that is still to be added to it."""


def scale_residual(parts: Any, multiplier: float) -> None:
    """Let a layer, given by its spec's parts, multiply what attention and MLP add to the residual stream."""

    def bias_dropout_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        add = get_bias_dropout_add(training, fused)

        def scaled(branch: WithBias, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            values, bias = branch
            by_bias = None if bias is None else bias * multiplier
            result: torch.Tensor = add((values * multiplier, by_bias), residual, dropout)
            return result

        return scaled

    parts.self_attn_bda = parts.mlp_bda = bias_dropout_add


def scale_ends(gpt: GPTModel, model: ModelConfig) -> None:
    """Let this stage's part of a model multiply the embedding and divide logits, if it has them."""
    if model.embedding_multiplier != 1 and gpt.pre_process:
        gpt.embedding.register_forward_hook(lambda *call: call[-1] * model.embedding_multiplier)
    if model.logits_scaling != 1 and gpt.post_process:

        def divided(_module: torch.nn.Module, _inputs: Any, output: WithBias) -> WithBias:
            logits_SBV, bias = output  # in their own memory: nothing of a step is larger
            return logits_SBV.div_(model.logits_scaling), bias

        gpt.output_layer.register_forward_hook(divided)
