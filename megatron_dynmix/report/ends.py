"""Where a run has come to: the last weight and the last loss of each source."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_dynmix.report.records import by_source
from megatron_dynmix.report.run import Run


def end_weights(run: Run) -> Mapping[str, float]:
    """After the last update, by name of the source."""
    return run.weights[-1].shares if run.weights else {}


def end_losses(run: Run) -> Mapping[str, float]:
    """The last that was recorded of each source."""
    found: dict[str, float] = {}
    for record in run.metrics:
        losses = by_source(record.get("source_loss"), None)
        found |= {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    return found
