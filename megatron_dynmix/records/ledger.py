"""The ledger: what every stage of the mix was to be, and a digest of what was really trained on.

Axes: N samples, D sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.data.blend import Cursor
from megatron_dynmix.data.dynamic_blend import DynamicBlendedDataset
from megatron_dynmix.data.loader import MicroBatch
from megatron_dynmix.data.source_set import SourceSet
from megatron_dynmix.mixing.controller import MixingController
from megatron_dynmix.records.mixing_update import TOLD
from megatron_dynmix.training.mix_setup import Horizon, Resolved

Why = Literal["start", "update", "sources changed"]


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
        """The digest over all ranks of the job; every rank has to ask for it."""
        # in two halves: their sums over the ranks stay far from the end of int64
        halves = torch.tensor([self.here >> 32, self.here % 2**32], device=device)
        torch.distributed.all_reduce(halves, group=parallel_state.get_data_parallel_group())
        high, low = halves.tolist()
        return int((self.carried + (high << 32) + low) % 2**64)

    def state_dict(self, device: torch.device) -> dict[str, Any]:
        """Plain values; every rank has to ask for it."""
        return {"first_sample": self.first_sample, "digest": f"{self.digest(device):016x}"}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DrawnSamples:
        """Go on from `state`."""
        return cls(state["first_sample"], int(state["digest"], 16))


def sample_hash(
    sample_N: NDArray[np.int64], dataset_id_N: NDArray[np.int16], row_N: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """One number per sample from its place in the run, its source and its row in the source."""
    value_N = _mix(sample_N.astype(np.uint64))
    value_N = _mix(value_N ^ dataset_id_N.astype(np.uint64))
    return _mix(value_N ^ row_N.astype(np.uint64))


def _mix(value_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    value_N = value_N + np.uint64(0x9E3779B97F4A7C15)
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))


def samples_line(*, iteration: int, first_sample: int, consumed_samples: int, digest: int) -> dict[str, Any]:
    """The line of one log interval: the samples first_sample <= i < consumed_samples."""
    return {
        "kind": "samples",
        "iteration": iteration,
        "first_sample": first_sample,
        "consumed_samples": consumed_samples,
        "digest": f"{digest:016x}",
    }


def begin_of(
    controller: MixingController, horizon: Horizon, initial_D: NDArray[np.float64]
) -> dict[str, Any]:
    """What the first weights of a run come from, beside its settings.

    The shares given; and how far it is to go, where something is made of that.
    """
    begin: dict[str, Any] = {"weights": initial_D.tolist()}
    strategies = (controller.strategy, *controller.shadows.values())
    if controller.guardrails.caps or any(strategy.starts for strategy in strategies):
        told = horizon.signal(0, 0, np.zeros_like(horizon.size_D))
        begin |= {name: getattr(told, name) for name in TOLD}
    return begin


@dataclass(frozen=True, kw_only=True)
class StageLine:
    """The line of one stage: what it takes to draw it again, and why it began."""

    why: Why
    iteration: int
    """Iterations done; for changed sources the first iteration that draws from them."""
    cursor: Cursor
    weights: tuple[float, ...]
    sources: SourceSet
    seed: int
    chunk_size: int
    mixing: MixingConfig
    """The settings that the weights came from."""
    resolved: Resolved
    """What those say by file and by source."""
    changes: tuple[str, ...] = ()
    """What became of each source, where they changed."""
    begin: Mapping[str, Any] = field(default_factory=dict)
    """What the first weights of a run came from, see `begin_of`."""

    @classmethod
    def of_last(
        cls,
        blend: DynamicBlendedDataset,
        sources: SourceSet,
        mixing: MixingConfig,
        resolved: Resolved,
        *,
        why: Why,
        iteration: int,
        changes: Sequence[str] = (),
        begin: Mapping[str, Any] | None = None,
    ) -> StageLine:
        """The line of the stage that has just begun."""
        stage = blend.stages[-1]
        return cls(
            why=why,
            iteration=iteration,
            cursor=blend.cursor_at(stage.start_sample),
            weights=stage.weights,
            sources=sources,
            seed=blend.seed,
            chunk_size=blend.chunk_size,
            mixing=mixing,
            resolved=resolved,
            changes=tuple(changes),
            begin=begin or {},
        )

    def to_json(self) -> dict[str, Any]:
        """The line as plain values."""
        return {
            "kind": "stage",
            "why": self.why,
            "iteration": self.iteration,
            "start_sample": self.cursor.sample,
            "sources": self.sources.names,
            "sizes": self.sources.sizes,
            "weights": self.weights,
            "seed": self.seed,
            "chunk_size": self.chunk_size,
            "drawn": self.cursor.drawn_D,
            "owed": self.cursor.owed_D,
            "fingerprints": self.sources.fingerprints,
            "shuffle_ids": self.sources.shuffle_ids,
            "mixing": self.mixing.flat(),
            "resolved": self.resolved,
            "changes": self.changes,
            **({"begin": self.begin} if self.begin else {}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> StageLine:
        """Read a line back.

        Raises:
            KeyError, TypeError, ValueError: a line that `to_json` did not write.

        """
        return cls(
            why=record["why"],
            iteration=record["iteration"],
            cursor=Cursor(
                int(record["start_sample"]),
                np.array(record["drawn"], np.int64),
                np.array(record["owed"], np.float64),
            ),
            weights=tuple(map(float, record["weights"])),
            sources=SourceSet(
                names=tuple(record["sources"]),
                fingerprints=tuple(record["fingerprints"]),
                sizes=tuple(record["sizes"]),
                shuffle_ids=tuple(record["shuffle_ids"]),
            ),
            seed=int(record["seed"]),
            chunk_size=int(record["chunk_size"]),
            mixing=MixingConfig.from_flat(record["mixing"]),
            resolved=record["resolved"],
            changes=tuple(record["changes"]),
            begin=record.get("begin", {}),
        )
