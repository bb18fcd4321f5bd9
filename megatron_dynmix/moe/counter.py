"""Gate loads per source: what was routed to each expert, on the device, without a host synchronization.

Every source is counted in two halves, of its even and its odd rows: how far they disagree tells how noisy
its load is. Axes: H = 2 halves, D sources, L MoE layers of the whole model, E experts, T tokens of this
rank's micro-batch, G = H * D groups (half h of source d is group h * D + d).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import HALVES

PROBABILITY_UNIT = 2**24
"""What a probability of 1 counts: float32 resolves no more, and 5e11 tokens fit into int64."""


class GateLoadCounter:
    """What the routers of one model write into, and `Reweighting` and the probe read.

    The training step announces each micro-batch with `set_sources`; every `GateLoadRouter` then calls
    `add` once per forward pass. Nothing is counted outside `recording`.

    Probabilities are counted in units of 2^-24, as integers: their sum does not depend on the order in
    which ranks, micro-batches and the parts of an interrupted interval are added.
    """

    def __init__(
        self,
        num_sources: int,
        num_layers: int,
        num_experts: int,
        device: torch.device,
        *,
        trained_only: bool = False,
        by_probability: bool = False,
    ) -> None:
        """Begin at zero; a dense model has 0 layers and nothing to count, shared experts are not counted.

        `trained_only` leaves out tokens whose label is not trained on. `by_probability` counts a token not
        as 1 for each expert chosen, but as the weight that the expert's output gets.
        """
        self.num_sources = num_sources
        self.by_probability = by_probability
        self.counts_HDLE = torch.zeros(
            HALVES, num_sources, num_layers, num_experts, dtype=torch.int64, device=device
        )  # int64: Float16Module turns float buffers into bf16, which cannot count
        self._trained_only = trained_only
        self._arange_G = torch.arange(HALVES * num_sources, device=device)
        self._source_T: torch.Tensor | None = None
        self._group_one_hot_GT: torch.Tensor | None = None
        self.is_recording = False
        """Whether a forward pass now would be counted."""
        self.trained_share: float | torch.Tensor = 1.0
        """Trained tokens / real tokens of the step under way, as the training step announces it."""

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Count the forward passes inside this context."""
        before, self.is_recording = self.is_recording, True
        try:
            yield
        finally:
            self.is_recording = before

    def set_sources(self, source_T: torch.Tensor, half_T: torch.Tensor, trained_T: torch.Tensor) -> None:
        """Announce the micro-batch that the next forward pass of this rank routes.

        All in the order in which the router flattens the tokens (sequence-major): the dataset_id of each
        token (-1 for padding, which is counted nowhere), which half of its source its row is in, whether its
        label is trained on.
        """
        self._source_T, self._group_one_hot_GT = source_T, None
        if not self.is_recording:
            return
        counted_T = source_T >= 0
        if self._trained_only:
            counted_T &= trained_T
        group_T = torch.where(counted_T, half_T * self.num_sources + source_T, -1)
        # The product in `add` runs on the matrix units; bincount or boolean indexing would wait for the
        # device. float32 holds sums of ones exactly up to 2^24 tokens of one micro-batch, float64 holds sums
        # of probabilities up to 2^29.
        dtype = torch.float64 if self.by_probability else torch.float32
        self._group_one_hot_GT = (self._arange_G[:, None] == group_T[None, :]).to(dtype)

    @property
    def padding_T(self) -> torch.Tensor:
        """True where the announced micro-batch is padding."""
        assert self._source_T is not None, "set_sources was not called before the forward pass"
        return self._source_T < 0

    def add(self, layer: int, mass_TE: torch.Tensor) -> None:
        """Add what one layer (from 0, of the whole model) routed of the announced micro-batch.

        `mass_TE` is which experts each token goes to; with `by_probability` their weights instead.
        """
        one_hot_GT = self._group_one_hot_GT
        assert one_hot_GT is not None, "set_sources was not called before the forward pass"
        assert one_hot_GT.shape[1] == mass_TE.shape[0], "ids and tokens differ in number"
        mass_TE = mass_TE.detach().to(one_hot_GT.dtype)
        if self.by_probability:
            mass_TE = (mass_TE * PROBABILITY_UNIT).round()
        added_HDE = (one_hot_GT @ mass_TE).to(torch.int64).view(HALVES, self.num_sources, -1)
        self.counts_HDLE.select(2, layer).add_(added_HDE)

    def take(self) -> torch.Tensor:
        """Return this rank's counts and start again from zero."""
        counts_HDLE = self.counts_HDLE.clone()
        self.counts_HDLE.zero_()
        return counts_HDLE

    def as_signal(self, counts_HDLE: torch.Tensor) -> NDArray[np.int64] | NDArray[np.float64]:
        """Return counts of this counter as a strategy reads them: tokens, or sums of probabilities."""
        half_counts_HDLE = counts_HDLE.cpu().numpy()
        return half_counts_HDLE / PROBABILITY_UNIT if self.by_probability else half_counts_HDLE


def reduce_counts(counts_HDLE: torch.Tensor) -> torch.Tensor:
    """Sum counts over all tokens of the job and all pipeline stages; exact, and the same on every rank.

    Every rank of a pipeline stage routes other tokens: expert-parallel ranks are carved out of the
    data-parallel ones, and with sequence or context parallelism a rank holds a slice of the sequence. The
    sum therefore runs over the expert-parallel group, then over the expert-tensor and expert-data groups
    (which together hold each token of the stage once, in every layout), then over the pipeline stages,
    whose layers are disjoint.
    """
    total_HDLE = counts_HDLE.clone()
    if not total_HDLE.numel():  # of a dense model
        return total_HDLE
    for group in (
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_data_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        if group.size() > 1:
            torch.distributed.all_reduce(total_HDLE, group=group)
    return total_HDLE
