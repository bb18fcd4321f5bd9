"""A run's records without a model: blend, controller and ledger as a run writes them, on random loads."""

import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dynmix.checkpoint.run_state import DrawnState, LogInterval, MixState, Progress, RunState
from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.data.blend_plan import BlendPlan
from megatron_dynmix.data.source_set import SourceSet
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.files import sha256
from megatron_dynmix.mixing.guardrails import Override
from megatron_dynmix.records.ledger import newest_stage, sample_hash
from megatron_dynmix.records.mixing_update import update_record
from megatron_dynmix.records.schema import Block, MixingUpdate, SamplesLine, TrainingRecord
from megatron_dynmix.records.signals import SIGNALS, packed, with_signal
from megatron_dynmix.training.mix import Horizon
from megatron_dynmix.training.mix_setup import controller_of, for_strategy
from megatron_dynmix.training.reweighting import begin_of
from megatron_dynmix.training.source_change import SourceChange
from megatron_dynmix.verify.run_records import RunRecords

BATCH, INTERVAL, LOG_INTERVAL = 8, 3, 2
MIXING = MixingConfig(strategy="gate-load", signal="probe", interval=INTERVAL)
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
    signals: bytes = b""
    metrics: dict[int, int] = field(default_factory=dict)
    settings: MixingConfig = MIXING
    resolved: dict[str, Any] = field(default_factory=dict)
    override: Override | None = None
    """The operator's word at the updates that come."""

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(3)
        weights_D = np.full(len(self.sizes), 1 / len(self.sizes))
        self._build(weights_D)
        self._begin = begin_of(self.controller, self.horizon, weights_D)
        self._write_stage("start", 0)

    def _build(self, weights_D) -> None:
        size_D = np.array(self.sizes)
        caps = [cap or np.inf for cap in self.resolved.get("max_epochs", [None] * len(size_D))]
        self.horizon = Horizon(
            schedule=BatchSchedule.growing(BATCH),
            train_iters=100,
            interval=INTERVAL,
            seed=self.seed,
            size_D=size_D,
            cap_D=np.array(caps) * size_D,
        )
        self.controller = controller_of(self.settings, self.resolved, list(self.prints), size_D, weights_D)
        first = self.controller.start(self.horizon.signal(0, 0, np.zeros_like(size_D)))
        self.blend = BlendPlan(
            self.sizes,
            first.weights_D,
            names=list(self.prints),
            seed=self.seed,
            chunk_size=BATCH * INTERVAL,
        )

    def _write_stage(self, why, iteration, changes=()) -> None:
        source_set = SourceSet.of(self.prints, self.sizes)
        line = newest_stage(
            self.blend,
            source_set,
            self.settings,
            self.resolved,
            why=why,
            iteration=iteration,
            changes=changes,
            begin=self._begin if why == "start" else {},
        )
        self.ledger.append(line.to_json())

    def train(self, iterations: int) -> "FakeRun":
        for _ in range(iterations):
            self.blend.advance_to(self.consumed)
            draws = np.array(self.blend.draws(self.consumed, self.consumed + BATCH))
            sample_N = np.arange(self.consumed, self.consumed + BATCH)
            self.digest = (self.digest + int(sample_hash(sample_N, *draws.T[:2]).sum())) % 2**64
            self.iteration += 1
            self.consumed += BATCH
            if self.iteration % LOG_INTERVAL == 0:
                self._log()
            if self.iteration % INTERVAL == 0:
                self._reweight()
        return self

    def _log(self) -> None:
        self.metrics[self.iteration] = self.consumed
        line = SamplesLine(
            iteration=self.iteration,
            first_sample=self.first_sample,
            consumed_samples=self.consumed,
            digest=f"{self.digest:016x}",
        )
        self.ledger.append(line.to_json())
        self.first_sample, self.digest = self.consumed, 0

    def _reweight(self) -> None:
        old_D, rows_D = self.blend.weights_D, self.blend.drawn_D(self.consumed)
        counts_DLE = self.rng.integers(1, 100, (len(self.sizes), 2, 8))
        halves_HDLE = np.stack([counts_DLE // 2, counts_DLE - counts_DLE // 2])
        told = self.horizon.signal(self.iteration, self.consumed, rows_D)
        loss_D = 1 + 1 / counts_DLE[:, 0, 0]
        signal = replace(told, counts_DLE=counts_DLE, half_counts_HDLE=halves_HDLE, loss_D=loss_D)
        decision = self.controller.update(signal, self.override)
        self.blend.append_stage(self.consumed, decision.weights_D)
        self._write_stage("update", self.iteration)
        update = update_record(
            self.controller,
            decision,
            iteration=self.iteration,
            consumed_samples=self.consumed,
            old_D=old_D,
            new_D=decision.weights_D,
            tokens_D=rows_D,
            rows_D=rows_D,
            size_D=self.blend.sizes_D,
            seconds={},
            override=self.override,
        )
        self.mixing[self.iteration] = self.line_of(update)

    def line_of(self, update: MixingUpdate) -> dict[str, Any]:
        """The line of an update, whose arrays go where they belong."""
        data = packed(update.arrays)
        block = Block(offset=len(self.signals), size=len(data), digest=sha256(data))
        self.signals += data
        return replace(update, block=block).to_json()

    def with_arrays(self, update: MixingUpdate) -> MixingUpdate:
        """The update with what its line points to."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / SIGNALS).write_bytes(self.signals)
            return with_signal(update, Path(folder) / SIGNALS)

    def change_settings(self, settings: MixingConfig, resolved=None) -> "FakeRun":
        """Go on from here with other settings, as a resumed run may."""
        state, before = self.controller.state, self.settings.strategy
        self.settings, self.resolved = settings, resolved or {}
        weights_D, size_D = self.controller.weights_D, np.array(self.sizes)
        self.controller = controller_of(settings, self.resolved, list(self.prints), size_D, weights_D)
        self.controller.resume(for_strategy(state, before, settings.strategy))
        return self

    def state(self) -> RunState:
        """The run state of a checkpoint."""
        number_D = np.arange(len(self.sizes))
        stats = SourceStats.of(np.tile(number_D.astype(np.float64), (3, 1)))
        return RunState(
            config={"mixing": self.settings.flat()},
            fingerprints=self.prints,
            probes={},
            progress=Progress(
                self.iteration,
                self.consumed,
                torch.from_numpy(100.0 * (number_D + 1)),
                batches=((self.iteration, BATCH),),
            ),
            mix=MixState(
                blend=self.blend.state,
                controller=self.controller.state,
                strategy=self.settings.strategy,
                overridden=False,
                interval_counts=np.ones((2, len(self.sizes), 2, 8), np.int64) * (number_D[:, None, None] + 1),
                interval_stats=stats,
            ),
            log_interval=LogInterval(stats, iterations=1, samples=8, seconds=0.5, micro_batches_here=3),
            drawn=DrawnState(first_sample=self.first_sample, digest=self.digest),
        )

    def change_sources(self, prints: Prints, sizes: tuple[int, ...], initial_D=None) -> list[str]:
        """Go on from here with other sources."""
        state = self.state()
        before = SourceSet.of(state.fingerprints, state.mix.blend.sizes)
        change = SourceChange.between(before, SourceSet.of(prints, sizes))
        initial_D = np.full(len(sizes), 1 / len(sizes)) if initial_D is None else initial_D
        state, changes = change.carry(state, initial_D)
        self.prints, self.sizes = prints, sizes
        self._build(initial_D)
        self.blend.resume(state.mix.blend)
        self.controller.resume(state.mix.controller)
        self._write_stage("sources changed", self.iteration + 1, changes)
        return changes

    def records(self, *, state: RunState | None = None) -> RunRecords:
        plain = json.loads(json.dumps(self.ledger))
        return RunRecords(
            ledger=plain,
            mixing=json.loads(json.dumps(self.mixing), object_hook=_int_keys),
            with_arrays=self.with_arrays,
            consumed_samples=dict(self.metrics),
            skipped_iterations=0,
            state=state,
            checkpoint="iter_0000000" if state else "there is no checkpoint",
        )

    def write(self, folder: Path) -> Path:
        """The files of a run directory."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in (
            ("ledger", self.ledger),
            ("mixing", self.mixing.values()),
            ("metrics", [training_record(*pair).to_json() for pair in self.metrics.items()]),
        ):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / SIGNALS).write_bytes(self.signals)
        return folder


def training_record(iteration: int, consumed_samples: int = 0, **changes: Any) -> TrainingRecord:
    """What was seen in a log interval."""
    record = TrainingRecord(
        iteration=iteration,
        consumed_samples=consumed_samples,
        lm_loss=2.5,
        source_loss={"chat": 2.0, "math": 3.0, "code": None},
        lr=3.0e-3,
        grad_norm=1.25,
        global_batch_size=32,
        seconds=0.5,
        tokens_per_second=8192.0,
        useful_token_share=0.75,
        tokens={"chat": 1000, "math": 2000, "code": 0},
        skipped_iterations=0,
        aux_losses={"load_balancing_loss": 1.01},
    )
    return replace(record, **changes)


def _int_keys(content: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in content.items()}


def fake_run(iterations: int = 0, **settings: Any) -> FakeRun:
    """Three sources; the small one is drawn over several times."""
    prints = {name: [f"sha of {name}", "tokenizer", "template"] for name in ("chat", "math", "code")}
    return FakeRun(prints, (40, 11, 23), **settings).train(iterations)
