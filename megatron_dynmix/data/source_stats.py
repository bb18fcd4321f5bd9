"""What passes over micro-batches saw of each source. Axes: D sources."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class SourceStats:
    """Sums over the tokens of one or several passes, the same on every rank."""

    loss_sum_D: torch.Tensor
    """Sum of the token losses, float64, in nats."""
    trained_D: torch.Tensor
    """Trained tokens, float64 (exact)."""
    tokens_D: torch.Tensor
    """Tokens that are not padding, float64 (exact)."""

    @classmethod
    def zero(cls, num_sources: int) -> SourceStats:
        """Return the sums of no pass."""
        return cls(*torch.zeros(3, num_sources, dtype=torch.float64))

    @classmethod
    def of(cls, sums: NDArray[np.float64]) -> SourceStats:
        """Return the stats that have these `sums`."""
        return cls(*torch.from_numpy(sums))

    @property
    def sums(self) -> NDArray[np.float64]:
        """All three, `[3, D]`."""
        return torch.stack([self.loss_sum_D, self.trained_D, self.tokens_D]).numpy()

    def __add__(self, other: SourceStats) -> SourceStats:
        return SourceStats.of(self.sums + other.sums)

    @property
    def lm_loss(self) -> float:
        """Mean over all trained tokens."""
        return float(self.loss_sum_D.sum() / self.trained_D.sum())

    def source_losses(self) -> list[float | None]:
        """Return the mean over each source's trained tokens; None for a source without any."""
        pairs = zip(self.loss_sum_D.tolist(), self.trained_D.tolist(), strict=True)
        return [loss / trained if trained else None for loss, trained in pairs]
