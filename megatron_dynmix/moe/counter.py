"""Counts of routed tokens per source, on the device, without a host synchronisation.

Axes: D sources, L MoE layers of the whole model, E experts, T tokens of this rank's micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class GateLoadCounter:
    """What the routers of one model write into, and the mixing callback reads.

    The training step announces each micro-batch with `set_sources`; every `GateLoadRouter` then calls
    `add` once per forward pass. Nothing is counted outside `recording`.
    """

    def __init__(self, num_sources: int, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.num_sources = num_sources
        self.counts_LDE = torch.zeros(
            num_layers, num_sources, num_experts, dtype=torch.int64, device=device
        )  # int64: Float16Module turns float buffers into bf16, which cannot count
        self._arange_D = torch.arange(num_sources, device=device)
        self._source_T: torch.Tensor | None = None
        self._source_one_hot_DT: torch.Tensor | None = None
        self._recording = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Count the forward passes inside this context."""
        before, self._recording = self._recording, True
        try:
            yield
        finally:
            self._recording = before

    @property
    def is_recording(self) -> bool:
        """Whether a forward pass now would be counted."""
        return self._recording

    def set_sources(self, source_T: torch.Tensor) -> None:
        """Announce the micro-batch that the next forward pass of this rank routes.

        Args:
            source_T: dataset_id of each token in the order in which the router flattens them
                (sequence-major), -1 for padding, which is then counted nowhere.

        """
        self._source_T = source_T
        # float32 counts exactly up to 2^24 tokens of one micro-batch, and the product in `add` runs on the
        # matrix units; bincount or boolean indexing would wait for the device.
        self._source_one_hot_DT = (
            (self._arange_D[:, None] == source_T[None, :]).float() if self._recording else None
        )

    @property
    def padding_T(self) -> torch.Tensor:
        """True where the announced micro-batch is padding."""
        assert self._source_T is not None, "set_sources was not called before the forward pass"
        return self._source_T < 0

    def add(self, layer: int, routing_map_TE: torch.Tensor) -> None:
        """Add one layer's choice of experts for the announced micro-batch.

        Args:
            layer: index of the MoE layer in the whole model, from 0.
            routing_map_TE: which experts each token goes to.

        """
        assert self._source_one_hot_DT is not None, "set_sources was not called before the forward pass"
        assert self._source_one_hot_DT.shape[1] == routing_map_TE.shape[0], "ids and tokens differ in number"
        self.counts_LDE[layer] += (self._source_one_hot_DT @ routing_map_TE.float()).to(torch.int64)

    def take(self) -> torch.Tensor:
        """Return this rank's counts `[L, D, E]` and start again from zero."""
        counts_LDE = self.counts_LDE.clone()
        self.counts_LDE.zero_()
        return counts_LDE
