"""What a batch changes before it is known to be good, and how that is taken back."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from megatron_dynmix.training.step import PassRunner

MOST_SKIPPED = 10
"""So many batches in a row that are not finite are no accident of the rows: the run stops."""


class BeforePass:
    """The counts, the model's buffers (expert bias) and the tracked auxiliary losses before a pass."""

    def __init__(self, run: PassRunner) -> None:
        self._run = run
        self._before = {name: tensor.clone() for name, tensor in self._changing().items()}

    def restore(self) -> None:
        """Make them what they were; a loss first tracked in this pass goes back to zero."""
        for name, tensor in self._changing().items():
            if name in self._before:
                tensor.copy_(self._before[name])
            else:
                tensor.zero_()

    def _changing(self) -> dict[str, torch.Tensor]:
        changing = {"counts": self._run.counter.counts_LHDE}
        for index, chunk in enumerate(self._run.chunks):
            changing |= {f"buffer {index} {name}": buffer for name, buffer in chunk.named_buffers()}
        tracker = get_moe_layer_wise_logging_tracker()
        return changing | {f"aux loss {name}": tracked["values"] for name, tracked in tracker.items()}
