"""How far a run has come: the part of its state that the loop keeps.

Axes: D sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_dynmix.training.step import SourceStats


@dataclass
class Progress:
    """How far a run has come: the loop's part of the run state."""

    iteration: int
    consumed_samples: int
    tokens_D: torch.Tensor
    """Tokens of each source trained on so far, float64 (exact)."""
    skipped_in_row: int = 0
    """Batches just before that were not finite and changed nothing."""


@dataclass
class LogInterval:
    """What was seen since the last log line; part of the run state, so that no iteration goes unrecorded."""

    stats: SourceStats
    iterations: int = 0
    samples: int = 0
    micro_batches_here: int = 0
    """Those of this rank and process: Megatron-Core's own trackers do not survive a restart."""
    seconds: float = 0.0
    skipped: int = 0

    @classmethod
    def start(cls, num_sources: int) -> LogInterval:
        """Nothing seen yet."""
        return cls(SourceStats.zero(num_sources))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, exact."""
        return {
            "stats": self.stats.state_dict(),
            "iterations": self.iterations,
            "samples": self.samples,
            "seconds": self.seconds,
            "skipped": self.skipped,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> LogInterval:
        """Go on from `state`."""
        return cls(
            SourceStats.from_state_dict(state["stats"]),
            iterations=state["iterations"],
            samples=state["samples"],
            seconds=state["seconds"],
            skipped=state["skipped"],
        )
