"""How many samples each step takes: those that are done, and those ahead."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from megatron_dynmix.errors import InputError

if TYPE_CHECKING:
    from megatron_dynmix.config.run_config import RunConfig

Pairs = tuple[tuple[int, int], ...]
SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
LARGEST = 10**18
"""No run has so many tokens."""


@dataclass(frozen=True)
class BatchSchedule:
    """Global batch size by samples consumed, and samples consumed by iteration."""

    steps: Pairs
    """(sample, batch size): each size holds from that sample on, the first one from sample 0."""
    done: Pairs = ()
    """(iterations, batch size) of the steps behind the run, whatever the settings were at the time."""

    @classmethod
    def of(cls, config: RunConfig) -> BatchSchedule:
        """Return the schedule of a run that was checked, as it begins."""
        training = config.training
        assert training.global_batch_size is not None, "checked before start"
        if training.step_batch_size_schedule is not None:
            steps = token_steps(training.step_batch_size_schedule)
            # in whole rows, as Megatron-LM counts them
            return cls(tuple((tokens // config.data.seq_length, size) for tokens, size in steps))
        return cls.growing(training.global_batch_size, training.rampup_batch_size)

    @classmethod
    def growing(cls, global_batch_size: int, rampup: tuple[int, ...] | None = None) -> BatchSchedule:
        """Return a schedule that reaches the batch size from (start, increment) after so many samples."""
        if rampup is None:
            return cls(((0, global_batch_size),))
        start, increment, samples = rampup
        count = (global_batch_size - start) // increment
        each = samples / count

        def first_of(step: int) -> int:
            # The same floating-point division as Megatron-Core's, so that both grow at the same sample.
            sample = math.ceil(step * each)
            sample -= sample > 0 and int((sample - 1) / each) >= step
            return sample + (int(sample / each) < step)

        sizes = {min(first_of(step), samples + 1): start + step * increment for step in range(count + 1)}
        return cls(tuple(sizes.items()))

    def batch_size(self, consumed_samples: int) -> int:
        """Return the samples of the step that begins at `consumed_samples`."""
        return self.steps[self._place(consumed_samples)][1]

    def samples_after(self, iterations: int, consumed_samples: int = 0) -> int:
        """Return the samples consumed after `iterations` more steps."""
        while iterations > 0:
            place = self._place(consumed_samples)
            size, count = self.steps[place][1], iterations
            if place + 1 < len(self.steps):
                count = min(iterations, -(-(self.steps[place + 1][0] - consumed_samples) // size))
            consumed_samples += count * size
            iterations -= count
        return consumed_samples

    def samples_at(self, iteration: int) -> int:
        """Return the samples consumed once `iteration` steps of the run are done, be they past or to come."""
        consumed_samples = 0
        for iterations, size in self.done:
            count = min(iterations, iteration)
            consumed_samples += count * size
            iteration -= count
        return self.samples_after(iteration, consumed_samples)

    def _place(self, consumed_samples: int) -> int:
        return bisect_right(self.steps, (consumed_samples, math.inf)) - 1


def one_more(done: Pairs, batch_size: int) -> Pairs:
    """Return the steps done after one more of this size."""
    if done and done[-1][1] == batch_size:
        return (*done[:-1], (done[-1][0] + 1, batch_size))
    return (*done, (1, batch_size))


def token_steps(text: str) -> Pairs:
    """Read Megatron-LM's `THRESHOLD:BATCH_SIZE ...`, thresholds in tokens, lowest first; or InputError."""
    try:
        pairs = [entry.split(":") for entry in text.replace(",", " ").split()]
        steps = tuple(sorted((_number(threshold), _number(size)) for threshold, size in pairs))
        if not steps or steps[0][0] != 0 or len(dict(steps)) < len(steps) or not all(dict(steps).values()):
            raise ValueError
    except ValueError:
        raise InputError(
            f"training.step_batch_size_schedule is {text!r}; it must be THRESHOLD:BATCH_SIZE pairs, "
            "thresholds in tokens, the first one 0 and none twice, such as '0:64 500M:128 1.5B:256'"
        ) from None
    return steps


def _number(text: str) -> int:
    factor = SUFFIXES.get(text[-1:].upper(), 1)
    try:
        number = Decimal(text[:-1] if factor > 1 else text) * factor
    except ArithmeticError:
        raise ValueError from None
    if not (number.is_finite() and 0 <= number <= LARGEST and number == int(number)):
        raise ValueError
    return int(number)
