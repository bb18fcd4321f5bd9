"""How much a run does: tokens, weight updates, and what measuring for them costs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.megatron import moe_layers
from megatron_dynmix.plan.parameters import transformer_here

BACKWARD = 2
"""Forward passes that a backward pass costs: a product for the inputs and one for the weights."""
COUNT_BYTES = 8
HALVES = 2
"""Each source is counted in two halves, so that the noise of its load can be told."""


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
    """Positions of a full batch, padding included."""
    assert config.training.global_batch_size is not None, "checked before"
    return config.training.global_batch_size * config.data.seq_length


def mixing_work(config: RunConfig, run_rows: int) -> MixingWork:
    """Updates of the weights and their cost.

    A token's forward pass costs the same in a probe and in training; training adds a backward pass that
    costs two, and one more forward pass under full recomputation. Selective recomputation is not reckoned.

    Args:
        config: the resolved configuration.
        run_rows: rows that the run trains on.

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
    experts = transformer.num_moe_experts or 1
    sources = len(config.data.sources)
    return MixingWork(
        updates=updates,
        probe_tokens=rows * config.data.seq_length,
        compute_share=probed / (probed + trained),
        count_bytes=COUNT_BYTES * HALVES * sources * len(moe_layers(transformer)) * experts,
    )
