"""A run's records without a model: blend, controller and ledger as a run writes them, on random loads."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blend_fixtures import sources

from megatron_dynmix.config.tree import MixingConfig
from megatron_dynmix.data.dynamic_blend import DynamicBlendedDataset
from megatron_dynmix.mixing.controller import MixingController, MixingUpdate
from megatron_dynmix.mixing.strategy import Signal
from megatron_dynmix.monitor.jsonl import JsonlWriter
from megatron_dynmix.training.ledger.lines import StageLine, sample_hash, samples_line
from megatron_dynmix.training.ledger.records import RunRecords
from megatron_dynmix.training.reweighting import build_strategy
from megatron_dynmix.training.source_change import SourceChange, SourceSet, fingerprint

BATCH, INTERVAL, LOG_INTERVAL = 8, 3, 2
MIXING = MixingConfig(interval=INTERVAL)
Prints = dict[str, list[str]]


@dataclass
class FakeRun:
    """Writes the records of a run step by step."""

    prints: Prints
    sizes: tuple[int, ...]
    seed: int = 7
    iteration: int = 0
    consumed: int = 0
    first_sample: int = 0
    digest: int = 0
    ledger: list[dict[str, Any]] = field(default_factory=list)
    mixing: dict[int, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(3)
        weights_D = np.full(len(self.sizes), 1 / len(self.sizes))
        self._build(weights_D)
        self._write_stage("start", 0)

    def _build(self, weights_D) -> None:
        self.blend = DynamicBlendedDataset(
            sources(*self.sizes), weights_D, seed=self.seed, chunk_size=BATCH * INTERVAL
        )
        self.controller = MixingController(list(self.prints), weights_D, build_strategy(MIXING))

    def _write_stage(self, why, iteration, changes=()) -> None:
        source_set = SourceSet.of(self.prints, self.blend.state_dict())
        line = StageLine.of_last(
            self.blend, source_set, MIXING, why=why, iteration=iteration, changes=changes
        )
        self.ledger.append(line.to_json())

    def train(self, iterations: int) -> "FakeRun":
        for _ in range(iterations):
            self.blend.advance_to(self.consumed)
            pairs = np.array(self.blend.pairs(self.consumed, self.consumed + BATCH))
            sample_N = np.arange(self.consumed, self.consumed + BATCH)
            self.digest = (self.digest + int(sample_hash(sample_N, *pairs.T).sum())) % 2**64
            self.iteration += 1
            self.consumed += BATCH
            if self.iteration % LOG_INTERVAL == 0:
                self._log()
            if self.iteration % INTERVAL == 0:
                self._reweight()
        return self

    def _log(self) -> None:
        self.metrics[self.iteration] = self.consumed
        line = samples_line(
            iteration=self.iteration,
            first_sample=self.first_sample,
            consumed_samples=self.consumed,
            digest=self.digest,
        )
        self.ledger.append(line)
        self.first_sample, self.digest = self.consumed, 0

    def _reweight(self) -> None:
        old_D = self.blend.weights_D
        counts_DLE = self.rng.integers(1, 100, (len(self.sizes), 2, 8))
        proposal, note = self.controller.update(Signal(counts_DLE=counts_DLE))
        self.blend.append_stage(self.consumed, self.controller.weights_D)
        rows_D = self.blend.drawn_D(self.consumed)
        self._write_stage("update", self.iteration)
        self.mixing[self.iteration] = MixingUpdate(
            iteration=self.iteration,
            consumed_samples=self.consumed,
            sources=self.controller.sources,
            old_weights=old_D,
            new_weights=self.controller.weights_D,
            delta=proposal.delta_D,
            load=proposal.load_DE,
            distance=proposal.distance_DD,
            tokens=rows_D,
            rows=rows_D,
            epochs=rows_D / self.blend.sizes_D,
            seconds={},
            note=note,
        ).to_json()

    def state(self) -> dict[str, Any]:
        """The run state of a checkpoint."""
        state = {
            "format_version": 1,
            "iteration": self.iteration,
            "consumed_samples": self.consumed,
            "fingerprints": self.prints,
            "tokens": [100.0 * (d + 1) for d in range(len(self.sizes))],
            "mixing": {
                "blend": self.blend.state_dict(),
                "controller": self.controller.state_dict(),
                "interval_counts": [[[d + 1] * 8 for d in range(len(self.sizes))] for _ in range(2)],
            },
            "log_interval": {"stats": [[float(d) for d in range(len(self.sizes))]] * 3, "samples": 8},
            "drawn_samples": {"first_sample": self.first_sample, "digest": f"{self.digest:016x}"},
        }
        return json.loads(json.dumps(state))

    def change_sources(self, prints: Prints, sizes: tuple[int, ...], initial_D=None) -> list[str]:
        """Go on from here with other sources."""
        state = self.state()
        before = SourceSet.of(state["fingerprints"], state["mixing"]["blend"])
        change = SourceChange.between(before, list(prints), list(map(fingerprint, prints.values())), sizes)
        initial_D = np.full(len(sizes), 1 / len(sizes)) if initial_D is None else initial_D
        state, changes = change.carry(state, initial_D)
        self.prints, self.sizes = prints, sizes
        self._build(initial_D)
        self.blend.load_state_dict(state["mixing"]["blend"])
        self.controller.load_state_dict(state["mixing"]["controller"])
        self._write_stage("sources changed", self.iteration + 1, changes)
        return changes

    def records(self, *, state: dict[str, Any] | None = None) -> RunRecords:
        plain = json.loads(json.dumps([line_json(line) for line in self.ledger]))
        return RunRecords(
            ledger=plain,
            mixing=json.loads(json.dumps(self.mixing), object_hook=_int_keys),
            consumed_samples=dict(self.metrics),
            skipped_iterations=0,
            state=state,
            checkpoint="iter_0000000" if state else "there is no checkpoint",
        )

    def write(self, folder: Path) -> Path:
        """The three files of a run directory."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in (
            ("ledger", self.ledger),
            ("mixing", self.mixing.values()),
            ("metrics", [metrics_line(*pair) for pair in self.metrics.items()]),
        ):
            writer = JsonlWriter(folder / f"{name}.jsonl")
            for line in lines:
                writer.write(line)
            writer.close()
        return folder


def metrics_line(iteration: int, consumed_samples: int) -> dict[str, int]:
    """What is read of a log interval's record."""
    return {"iteration": iteration, "consumed_samples": consumed_samples, "skipped_iterations": 0}


def line_json(line: dict[str, Any]) -> dict[str, Any]:
    """A line as it comes back from its file."""
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in line.items()}


def _int_keys(content: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in content.items()}


def fake_run(iterations: int = 0) -> FakeRun:
    """Three sources; the small one is drawn over several times."""
    prints = {name: [f"sha of {name}", "tokenizer", "template"] for name in ("chat", "math", "code")}
    return FakeRun(prints, (40, 11, 23)).train(iterations)
