"""How ranks are grouped, and what follows from that for a step.

The groups are those of Megatron-Core's own `RankGenerator`, in the order that it starts a job with.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from megatron.core.parallel_state import RankGenerator

from megatron_dynmix.config import RunConfig

ORDER = "tp-cp-ep-dp-pp"
"""The default of Megatron-Core's `initialize_model_parallel`: neighbors share a tensor-parallel group."""
SHOWN_GROUPS = 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the groups that a number of ranks is divided into."""

    world_size: int
    tp: int
    pp: int
    cp: int
    ep: int
    etp: int
    """Ranks that share each expert; the tensor-parallel size if not given."""
    virtual: int
    """Chunks of the model that each pipeline stage has; 1 if the pipeline is not interleaved."""

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Layout:
        """Return the layout of a configuration, on ranks that it was checked for."""
        size, given = config.parallel.size, config.parallel.megatron
        tp = size("tensor_model_parallel_size")
        return cls(
            world_size=world_size,
            tp=tp,
            pp=size("pipeline_model_parallel_size"),
            cp=size("context_parallel_size"),
            ep=size("expert_model_parallel_size"),
            etp=int(given.get("expert_tensor_parallel_size") or tp),
            virtual=config.parallel.virtual_stages or 1,
        )

    @property
    def dp(self) -> int:
        """Return the replicas of all layers but experts, each with rows of its own."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Return the replicas of each expert."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def groups(self) -> dict[str, list[list[int]]]:
        """Return the ranks of each kind of group, those of one rank included."""
        dense = RankGenerator(tp=self.tp, ep=1, dp=self.dp, pp=self.pp, cp=self.cp, order=ORDER)
        experts = RankGenerator(tp=self.etp, ep=self.ep, dp=self.expert_dp, pp=self.pp, cp=1, order=ORDER)
        return {
            **{kind.upper(): dense.get_ranks(kind) for kind in ("tp", "cp", "dp", "pp")},
            "expert TP": experts.get_ranks("tp"),
            "EP": experts.get_ranks("ep"),
            "expert DP": experts.get_ranks("dp"),
        }

    def micro_batches(self, config: RunConfig) -> int:
        """Return the micro-batches of each rank in a step of the full batch."""
        assert config.training.global_batch_size is not None, "checked before"
        return config.training.global_batch_size // (config.training.micro_batch_size * self.dp)

    def bubble_share(self, config: RunConfig) -> float:
        """Return the share of a step that a stage waits for others to begin and to end.

        (p - 1) / (v m + p - 1), from the ratio (p - 1) / (v m) of waiting to work in Narayanan et al. 2021
        (arXiv 2104.04473, section 2.2): p stages, v chunks each, m micro-batches, all equally slow.
        """
        return (self.pp - 1) / (self.virtual * self.micro_batches(config) + self.pp - 1)

    def as_json(self) -> dict[str, int]:
        """Return all sizes by name."""
        return {**dataclasses.asdict(self), "dp": self.dp, "expert_dp": self.expert_dp}

    def describe(self) -> str:
        """Return the sizes in one line."""
        experts = f"; experts: ETP {self.etp} x EP {self.ep} x PP {self.pp} x expert DP {self.expert_dp}"
        interleaved = f" (interleaved, {self.virtual} chunks each)" if self.virtual > 1 else ""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{ranks} = TP {self.tp} x CP {self.cp} x DP {self.dp} x PP {self.pp}{interleaved}{experts}"


def group_text(groups: list[list[int]]) -> str:
    """Return the first groups of a kind by their ranks: a run as `0-7`, equal steps as `0, 8, .. 24`."""
    shown = "; ".join(map(_ranks_text, groups[:SHOWN_GROUPS]))
    return f"{shown}; ..." if len(groups) > SHOWN_GROUPS else shown


def _ranks_text(ranks: list[int]) -> str:
    steps = {after - before for before, after in itertools.pairwise(ranks)}
    if len(ranks) < 3 or len(steps) > 1:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}-{ranks[-1]}" if steps == {1} else f"{ranks[0]}, {ranks[1]}, .. {ranks[-1]}"
