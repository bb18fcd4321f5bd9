"""The router of ModuleFormer (MoLM): two layers with a bias and a GELU between.

Axes: S positions, B rows of this rank's micro-batch, H hidden size, W inner width, E experts.
Source: the modelling code published with the model (IBM/ModuleFormer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import gelu, linear

from megatron_dynmix.moe.router import GateLoadRouter, replicated


class GeluRouter(GateLoadRouter):
    """`GateLoadRouter` whose logits come from `Linear(H, W)` with a bias, GELU, `Linear(W, E)` without.

    The choice of experts and their weights are the parent's: with `moe_router_pre_softmax` the largest of the
    probabilities among all experts, as they are. Parameters, replicated like those of any router: `weight`
    `[W, H]`, `inner_bias` `[W]` and `output_weight` `[E, W]`.
    """

    def __init__(self, config: Any, pg_collection: Any = None, *, width: int, **kwargs: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.weight = replicated(torch.empty(width, config.hidden_size), config)
        self.inner_bias = replicated(torch.zeros(width), config)
        self.output_weight = replicated(torch.empty(config.num_moe_experts, width), config)
        if config.perform_initialization:
            config.init_method(self.weight)
            config.init_method(self.output_weight)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return router logits `[S, B, E]` in `moe_router_dtype`."""
        hidden_SBW = super().gating(input)
        dtype = hidden_SBW.dtype
        return linear(gelu(hidden_SBW + self.inner_bias.to(dtype)), self.output_weight.to(dtype))
