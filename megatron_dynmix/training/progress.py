"""How far a run has come: the part of its state that the loop keeps.

Axes: D sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dynmix.checkpoint.run_state import LogIntervalState
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

    @property
    def state(self) -> LogIntervalState:
        """What a resumed run needs."""
        return LogIntervalState(
            sums=self.stats.sums,
            iterations=self.iterations,
            samples=self.samples,
            seconds=self.seconds,
            skipped=self.skipped,
        )

    @classmethod
    def resumed(cls, state: LogIntervalState) -> LogInterval:
        """Continue from a state."""
        return cls(
            SourceStats.of(state.sums),
            iterations=state.iterations,
            samples=state.samples,
            seconds=state.seconds,
            skipped=state.skipped,
        )
