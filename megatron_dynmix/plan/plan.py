"""What is known of a run on so many ranks before it starts: layout, memory, work and sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.attention_experts import counted_experts
from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.host import Host
from megatron_dynmix.config.megatron import moe_layers
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.mixing.strategy import HALVES
from megatron_dynmix.plan.layout import Layout, group_text
from megatron_dynmix.plan.memory import StageMemory, checkpoint_bytes, memory_by_stage
from megatron_dynmix.plan.parameters import model_parameters, transformer_here

BACKWARD = 2
"""Forward passes that a backward pass costs: a product for the inputs and one for the weights."""
COUNT_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class SourceWork:
    """What a run takes of a source."""

    name: str
    rows: int
    """Rows of an epoch."""
    useful_share: float
    """Tokens that are no padding, of all positions of the rows."""
    share: float
    """Share of the rows drawn, at the start."""

    @classmethod
    def of(cls, rows: PackedRows, share: float) -> SourceWork:
        """Return what is taken of these rows."""
        useful = rows.packing_report.useful_token_share
        return cls(name=rows.name, rows=len(rows), useful_share=useful, share=share)


@dataclass(frozen=True, kw_only=True)
class MixingWork:
    """What the changing mix asks of a run."""

    updates: int
    probe_tokens: int
    """Positions of held-out rows that one measurement reads, of all sources; 0 if training measures."""
    mixing_compute_share: float
    """Part of all computing that is spent on probes."""
    count_bytes: int
    """Size of the counts that each rank sends and receives for an update."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a checked run; `InputError` if its parameters are known only once it is built."""

    config: RunConfig
    world_size: int
    host: Host
    sources: Mapping[str, SourceWork | str]
    """By name; where a source is not prepared, why nothing is known of it."""
    notes: tuple[str, ...] = ()
    """What could not be checked here."""
    batches: BatchSchedule | None = None
    """Those of a run that is resumed; None for those of the configuration."""

    @cached_property
    def layout(self) -> Layout:
        """Return how the ranks are grouped."""
        return Layout.of(self.config, self.world_size)

    @cached_property
    def memory(self) -> list[StageMemory]:
        """Return that of a rank of each pipeline stage."""
        return memory_by_stage(self.config, self.layout, self.host)

    @property
    def largest(self) -> StageMemory:
        """Return the stage that needs the most memory."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def iterations(self) -> int:
        """Return how many the whole run has."""
        assert self.config.training.train_iters is not None, "checked before"
        return self.config.training.train_iters

    @property
    def run_rows(self) -> int:
        """Return the rows that the whole run trains on."""
        return (self.batches or BatchSchedule.of(self.config)).samples_at(self.iterations)

    @property
    def tokens_per_iteration(self) -> int:
        """Return the positions of a full batch, padding included."""
        assert self.config.training.global_batch_size is not None, "checked before"
        return self.config.training.global_batch_size * self.config.data.seq_length

    @property
    def work(self) -> MixingWork:
        """Return the updates of the weights and their cost.

        A token's forward pass costs the same in a probe and in training; training adds a backward pass that
        costs two, and one more forward pass under full recomputation. Selective recomputation is not counted.
        """
        mixing, sources, length = self.config.mixing, self.config.data.sources, self.config.data.seq_length
        probes = mixing.signal == "probe" and mixing.measures
        rows = -(-mixing.probe_tokens // length) * len(sources) if probes else 0
        transformer = transformer_here(self.config)
        passes = 1 + BACKWARD + (transformer.recompute_granularity == "full")
        updates = self.iterations // mixing.interval
        probed, trained = updates * rows, passes * self.run_rows
        experts = counted_experts(self.config, transformer.num_moe_experts)
        counts = len(sources) * len(moe_layers(transformer)) * experts
        return MixingWork(
            updates=updates,
            probe_tokens=rows * length,
            mixing_compute_share=probed / (probed + trained),
            count_bytes=COUNT_BYTES * HALVES * counts,
        )

    def epochs(self, source: SourceWork) -> float:
        """Return how often the run draws each row of a source, if its share stays as it is."""
        return source.share * self.run_rows / source.rows

    def as_json(self) -> dict[str, Any]:
        """Return all of it in plain values: bytes, counts, shares."""
        parameters = model_parameters(self.config)
        return {
            "layout": self.layout.as_json(),
            "groups": {name: group_text(groups) for name, groups in self.layout.groups().items()},
            "parameters": parameters,
            "active_parameters": model_parameters(self.config, active=True),
            "micro_batches": self.layout.micro_batches(self.config),
            "bubble_share": self.layout.bubble_share(self.config),
            "tokens_per_iteration": self.tokens_per_iteration,
            "run_rows": self.run_rows,
            "memory": [stage.as_json() for stage in self.memory],
            "sources": {
                name: source if isinstance(source, str) else self._source_json(source)
                for name, source in self.sources.items()
            },
            **dataclasses.asdict(self.work),
            "checkpoint_bytes": checkpoint_bytes(self.config, parameters),
            "not_checked": list(self.notes),
        }

    def _source_json(self, source: SourceWork) -> dict[str, Any]:
        return {
            "rows": source.rows,
            "share": source.share,
            "epochs": self.epochs(source),
            "tokens_per_epoch": source.rows * self.config.data.seq_length,
            "useful_share": source.useful_share,
        }
