"""How many samples each step takes: Megatron-Core's micro-batch arithmetic, looked ahead."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dynmix.config.run_config import TrainingConfig


@dataclass(frozen=True)
class BatchSchedule:
    """Global batch size as a function of the samples consumed."""

    global_batch_size: int
    rampup: tuple[int, ...] | None = None
    """Start, increment and the samples over which the batch grows; None: the same size throughout."""

    @classmethod
    def of(cls, training: TrainingConfig) -> BatchSchedule:
        """Return the schedule of a configuration that was checked."""
        assert training.global_batch_size is not None, "checked before start"
        return cls(training.global_batch_size, training.rampup_batch_size)

    def batch_size(self, consumed_samples: int) -> int:
        """Return the samples of the step that begins at `consumed_samples`."""
        if self.rampup is None:
            return self.global_batch_size
        start, increment, samples = self.rampup
        if consumed_samples > samples:
            return self.global_batch_size
        # The same floating-point division as Megatron-Core's, so that both grow at the same sample.
        per_increment = samples / ((self.global_batch_size - start) // increment)
        return start + int(consumed_samples / per_increment) * increment

    def samples_after(self, iterations: int, consumed_samples: int = 0) -> int:
        """Return the samples consumed after `iterations` more steps."""
        while iterations and (size := self.batch_size(consumed_samples)) != self.global_batch_size:
            consumed_samples += size
            iterations -= 1
        return consumed_samples + iterations * self.global_batch_size
