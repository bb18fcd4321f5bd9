"""The router of LLaMA-MoE v1: two layers with a tanh between, and noise of a learned size while training.

Axes: S positions, B rows of this rank's micro-batch, H hidden size, E experts.
Source: the modelling code published with the model (pjlab-sys4nlp/llama-moe, class `TopKBalancedNoisyGate`)
and Shazeer et al. 2017 (arXiv 1701.06538), equations 4 and 5, for the noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, softplus

from megatron_dynmix.config.run_config import RouterNoise
from megatron_dynmix.moe.router import GateLoadRouter, replicated

NOISE_EPSILON = 1e-2
"""Least standard deviation of the noise: `gate_noise_epsilon` of every published LLaMA-MoE v1."""


class MlpRouter(GateLoadRouter):
    """`GateLoadRouter` whose logits come from `Linear(H, E)`, tanh, `Linear(E, E)`, all without biases.

    The choice of experts and their scores are the parent's: softmax over the chosen logits, times
    `moe_router_topk_scaling_factor` (LLaMA-MoE's `score_scale_factor`). Parameters, replicated like those of
    any router: `weight` `[E, H]`, `output_weight` `[E, E]`, and `noise_weight` `[E, H]` unless `noise` is
    None.

    Noise comes from the generator that dropout has: it follows from the iteration's number, a recomputation
    draws it again, and tensor-parallel ranks, which hold different tokens here, draw different noise.
    """

    def __init__(
        self, config: Any, pg_collection: Any = None, *, noise: RouterNoise | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.noise = noise
        experts = self.config.num_moe_experts
        self.output_weight = replicated(torch.empty(experts, experts), self.config)
        if self.config.perform_initialization:
            self.config.init_method(self.output_weight)
        self.noise_weight: torch.nn.Parameter | None = None
        if noise is not None:
            self.noise_weight = replicated(torch.zeros(experts, self.config.hidden_size), self.config)
            self.noise_weight.requires_grad_(noise == "training")

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return router logits `[S, B, E]` in `moe_router_dtype`, with noise while training."""
        hidden_SBE = torch.tanh(super().gating(input))
        dtype = hidden_SBE.dtype
        logits_SBE = linear(hidden_SBE, self.output_weight.to(dtype))
        if not (self.training and self.noise == "training"):
            return logits_SBE
        assert self.noise_weight is not None
        deviation_SBE = softplus(linear(input.to(dtype), self.noise_weight.to(dtype))) + NOISE_EPSILON
        return logits_SBE + torch.randn_like(logits_SBE) * deviation_SBE
