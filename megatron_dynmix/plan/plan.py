"""What is known of a run on so many ranks before it starts: layout, memory, work and sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.host import Host
from megatron_dynmix.config.megatron import moe_layers
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.mixing.strategy import HALVES
from megatron_dynmix.plan.layout import Layout, bubble_share, group_text, micro_batches
from megatron_dynmix.plan.memory import StageMemory, checkpoint_bytes, memory_by_stage
from megatron_dynmix.plan.parameters import model_parameters, transformer_here

BACKWARD = 2
"""Forward passes that a backward pass costs: a product for the inputs and one for the weights."""
COUNT_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class MixingWork:
    """What the changing mix asks of a run."""

    updates: int
    probe_tokens: int
    """Positions of held-out rows that one measurement reads, of all sources; 0 if training measures."""
    compute_share: float
    """Part of all computing that is spent on probes."""
    count_bytes: int
    """Of the counts that each rank sends and receives for an update."""


def tokens_per_iteration(config: RunConfig) -> int:
    """Return the positions of a full batch, padding included."""
    assert config.training.global_batch_size is not None, "checked before"
    return config.training.global_batch_size * config.data.seq_length


def mixing_work(config: RunConfig, run_rows: int) -> MixingWork:
    """Return the updates of the weights and their cost, for a run that trains on `run_rows`.

    A token's forward pass costs the same in a probe and in training; training adds a backward pass that
    costs two, and one more forward pass under full recomputation. Selective recomputation is not counted.
    """
    mixing, iterations = config.mixing, config.training.train_iters
    assert iterations is not None, "checked before"
    updates = iterations // mixing.interval
    needs = [chosen.needs for chosen in (mixing.chosen, *mixing.shadows)]
    probes = mixing.signal == "probe" and any(map(any, needs))
    rows = -(-mixing.probe_tokens // config.data.seq_length) * len(config.data.sources) if probes else 0
    transformer = transformer_here(config)
    passes = 1 + BACKWARD + (transformer.recompute_granularity == "full")
    probed, trained = updates * rows, passes * run_rows
    counts = len(config.data.sources) * len(moe_layers(transformer)) * (transformer.num_moe_experts or 1)
    return MixingWork(
        updates=updates,
        probe_tokens=rows * config.data.seq_length,
        compute_share=probed / (probed + trained),
        count_bytes=COUNT_BYTES * HALVES * counts,
    )


@dataclass(frozen=True, kw_only=True)
class SourceWork:
    """What a run takes of a source."""

    name: str
    rows: int
    """Of an epoch."""
    useful_share: float
    """Tokens that are no padding, of all positions of the rows."""
    share: float
    """Of the rows drawn, at the start."""

    @classmethod
    def of(cls, rows: PackedRows, share: float) -> SourceWork:
        """Return what is taken of these rows."""
        useful = rows.packing_report.useful_token_share
        return cls(name=rows.name, rows=len(rows), useful_share=useful, share=share)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run before it starts."""

    config: RunConfig
    layout: Layout
    host: Host
    memory: list[StageMemory]
    """Of a rank of each pipeline stage."""
    run_rows: int
    work: MixingWork
    sources: Mapping[str, SourceWork | str]
    """By name; where a source is not prepared, why nothing is known of it."""
    notes: tuple[str, ...] = field(default=())
    """What could not be checked here."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        world_size: int,
        host: Host,
        *,
        run_rows: int,
        sources: Mapping[str, SourceWork | str],
        notes: tuple[str, ...] = (),
    ) -> Plan:
        """Plan a run that was checked.

        Raises:
            InputError: a model whose parameters are not known before it is built.

        """
        layout = Layout.of(config, world_size)
        return cls(
            config=config,
            layout=layout,
            host=host,
            memory=memory_by_stage(config, layout, host),
            run_rows=run_rows,
            work=mixing_work(config, run_rows),
            sources=sources,
            notes=notes,
        )

    @property
    def largest(self) -> StageMemory:
        """Return the stage that needs the most memory."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def micro_batches(self) -> int:
        """Return those of each rank in a step of the full batch."""
        return micro_batches(self.config, self.layout)

    @property
    def bubble(self) -> float:
        """Return the share of a step that pipeline stages wait."""
        return bubble_share(self.layout, self.micro_batches)

    def fits(self, gpu_bytes: int) -> bool:
        """Return whether the largest stage has room on such a GPU."""
        return self.largest.needed <= gpu_bytes

    def as_json(self) -> dict[str, Any]:
        """Return all of it in plain values: bytes, counts, shares."""
        parameters = model_parameters(self.config)
        return {
            "layout": self.layout.as_json(),
            "groups": {name: group_text(groups) for name, groups in self.layout.groups()},
            "parameters": parameters,
            "active_parameters": model_parameters(self.config, active=True),
            "micro_batches": self.micro_batches,
            "bubble_share": self.bubble,
            "tokens_per_iteration": tokens_per_iteration(self.config),
            "run_rows": self.run_rows,
            "memory": [_stage_json(stage) for stage in self.memory],
            "sources": {
                name: source if isinstance(source, str) else self._source_json(source)
                for name, source in self.sources.items()
            },
            "updates": self.work.updates,
            "probe_tokens": self.work.probe_tokens,
            "mixing_compute_share": self.work.compute_share,
            "count_bytes": self.work.count_bytes,
            "checkpoint_bytes": checkpoint_bytes(self.config, parameters),
            "not_checked": list(self.notes),
        }

    def epochs(self, source: SourceWork) -> float:
        """Return how often the run draws each row of a source, if its share stays as it is."""
        return source.share * self.run_rows / source.rows

    def _source_json(self, source: SourceWork) -> dict[str, Any]:
        tokens = source.rows * self.config.data.seq_length
        return {
            **{"rows": source.rows, "share": source.share, "epochs": self.epochs(source)},
            **{"tokens_per_epoch": tokens, "useful_share": source.useful_share},
        }


def _stage_json(stage: StageMemory) -> dict[str, Any]:
    return {
        **{"stage": stage.stage, "layers": stage.layers, "parameters": stage.parameters.total},
        **{"weights": stage.weights, "gradients": stage.gradients, "optimizer": stage.optimizer},
        **{"activations": stage.activations.total, "total": stage.total, "needed": stage.needed},
    }
