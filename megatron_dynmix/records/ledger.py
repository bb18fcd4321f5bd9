"""The ledger: what every stage of the mix was to be, and a digest of what was really trained on.

Axes: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.data.blend import Cursor, splitmix64
from megatron_dynmix.data.blend_plan import BlendPlan
from megatron_dynmix.data.loader import MicroBatch
from megatron_dynmix.data.source_set import SourceSet
from megatron_dynmix.records.schema import SamplesLine, StageLine, Why


@dataclass
class DrawnSamples:
    """Digest of the samples trained on since `first_sample`.

    A sum of one hash per sample, modulo 2^64: it does not depend on which rank trained on a sample, nor on
    the order within a step. Each data-parallel rank folds its own micro-batches.
    """

    first_sample: int
    carried: int
    """What the whole job had drawn when it was stopped; from the checkpoint."""
    here: int = 0

    def fold(self, micro_batches: Sequence[MicroBatch], consumed_samples: int) -> None:
        """Add the micro-batches of this rank in the step that began at `consumed_samples`."""
        rank = parallel_state.get_data_parallel_rank()
        ranks = parallel_state.get_data_parallel_world_size()
        for number, micro_batch in enumerate(micro_batches):
            rows = len(micro_batch["row"])
            first = consumed_samples + (number * ranks + rank) * rows
            sample_N = np.arange(first, first + rows)
            hash_N = sample_hash(sample_N, micro_batch["dataset_id"].numpy(), micro_batch["row"].numpy())
            self.here = (self.here + int(hash_N.sum())) % 2**64

    def digest(self, device: torch.device) -> int:
        """Return the digest over all ranks of the job; every rank has to ask for it."""
        # in two halves: their sums over the ranks stay far from the end of int64
        halves = torch.tensor([self.here >> 32, self.here % 2**32], device=device)
        torch.distributed.all_reduce(halves, group=parallel_state.get_data_parallel_group())
        high, low = halves.tolist()
        return int((self.carried + (high << 32) + low) % 2**64)

    def line(self, iteration: int, consumed_samples: int, device: torch.device) -> SamplesLine:
        """Return the line of the samples from `first_sample` to here; every rank has to ask for it."""
        return SamplesLine(
            iteration=iteration,
            first_sample=self.first_sample,
            consumed_samples=consumed_samples,
            digest=f"{self.digest(device):016x}",
        )


def sample_hash(
    sample_N: NDArray[np.int64], dataset_id_N: NDArray[np.int16], row_N: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Return one number per sample from its place in the run, its source and its row in the source."""
    value_N = splitmix64(sample_N.astype(np.uint64))
    value_N = splitmix64(value_N ^ dataset_id_N.astype(np.uint64))
    return splitmix64(value_N ^ row_N.astype(np.uint64))


def newest_stage(
    blend: BlendPlan,
    sources: SourceSet,
    mixing: MixingConfig,
    resolved: Mapping[str, Any],
    *,
    why: Why,
    iteration: int,
    changes: Sequence[str],
    begin: Mapping[str, Any],
) -> StageLine:
    """Return the line of the stage that has just begun."""
    stage = blend.stages[-1]
    cursor = blend.cursor_at(stage.start_sample)
    return StageLine(
        why=why,
        iteration=iteration,
        start_sample=cursor.sample,
        sources=list(sources.names),
        sizes=list(sources.sizes),
        weights=list(stage.weights),
        seed=blend.seed,
        chunk_size=blend.chunk_size,
        drawn=cursor.drawn_D.tolist(),
        owed=cursor.owed_D.tolist(),
        fingerprints=list(sources.fingerprints),
        mixing=mixing.flat(),
        resolved=dict(resolved),
        changes=list(changes),
        begin=dict(begin),
    )


def cursor_of(line: StageLine) -> Cursor:
    """Return where the sources stand as a stage begins."""
    return Cursor(line.start_sample, np.array(line.drawn, np.int64), np.array(line.owed, np.float64))
