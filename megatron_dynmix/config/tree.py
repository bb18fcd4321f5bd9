"""The RunConfig tree: frozen, and checked at construction for what one value alone can get wrong.

Fields of Megatron-Core's own dataclasses are written flat in YAML beside ours; here they are kept in each
section's `megatron` mapping. What several sections must agree on is checked in `check.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from megatron_dynmix.errors import InputError

StrategyName = Literal["gate-load", "uniform", "fixed"]
SignalName = Literal["probe", "train"]
Overlong = Literal["drop", "truncate", "error"]
Template = Literal["tokenizer", "vicuna"]
Nonfinite = Literal["stop", "skip"]
DecayStyle = Literal["linear", "cosine", "constant", "inverse-square-root"]
OnSaveError = Literal["stop", "continue"]


def _require(condition: bool, name: str, value: object, need: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}; it must be {need}")


def _one_of(name: str, value: str, kind: Any) -> None:
    allowed = get_args(kind)
    _require(value in allowed, name, value, f"one of {', '.join(allowed)}")


def _positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        good = value is None or (value > 0 and math.isfinite(value))
        _require(good, f"{prefix}.{name}", value, "a positive number")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model; any field of Megatron-Core's `TransformerConfig` may stand beside these."""

    preset: str = "tiny"
    """Published sizes to start from; see `presets.py`."""
    vocab_size: int | None = None
    """Rows of the embedding, before padding; the preset's if not given."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: int | None = None
    """Longest sequence the model allows; the preset's if not given."""
    rotary_base: float | None = None
    """Base of the rotary embedding; the preset's if not given."""
    untie_embeddings_and_output_weights: bool = True
    """Whether the output layer has weights of its own."""
    qk_layernorm_full_width: bool = False
    """Normalise queries and keys over all heads together, as OLMoE does, not head by head."""
    freeze_router: bool = False
    """Keep the routers as they are: their weights get no gradient."""
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TransformerConfig`."""

    def __post_init__(self) -> None:
        _positive(self, "model", "vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings")
        _positive(self, "model", "rotary_base")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Layout; any field of `ModelParallelConfig` or `DistributedDataParallelConfig` may stand beside."""

    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    distributed_timeout_minutes: float = 10.0
    """How long a collective waits for the other ranks."""
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelParallelConfig` and `DistributedDataParallelConfig`."""

    def __post_init__(self) -> None:
        _positive(self, "parallel", "distributed_timeout_minutes")
        for name, value in self.megatron.items():
            if name.endswith("_parallel_size") and value is not None:
                _require(value >= 1, f"parallel.{name}", value, "1 or more")

    @property
    def virtual_stages(self) -> int:
        """Chunks of the model that each pipeline stage has, one after another; 0 if not interleaved."""
        return int(self.megatron.get("virtual_pipeline_model_parallel_size") or 0)

    @property
    def overlap_p2p_comm(self) -> bool:
        """Whether pipeline stages send while they compute: as Megatron-LM has it, if interleaved."""
        given = self.megatron
        return bool(given.get("overlap_p2p_comm", self.virtual_stages and not given.get("batch_p2p_comm")))

    def size(self, name: str) -> int:
        """A group size such as `tensor_model_parallel_size`; 1 if not given."""
        return int(self.megatron.get(name) or 1)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named dataset."""

    path: str
    """A ShareGPT JSONL file, or the prefix of a prepared source."""
    weight: float | None = None
    """Initial share; uniform if no source has one."""
    probe: str | None = None
    """Held-out rows of the same kind, for `mixing.signal: probe`."""

    def __post_init__(self) -> None:
        if self.weight is not None:
            ok = math.isfinite(self.weight) and self.weight >= 0
            _require(ok, "a source's weight", self.weight, "a finite number, 0 or more")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    tokenizer: str | None = None
    """Folder of a Hugging Face tokenizer."""
    template: Template = "tokenizer"
    """How a conversation becomes text: the tokenizer's own chat template, or `vicuna`."""
    seq_length: int = 2048
    """Positions of a row."""
    overlong: Overlong = "drop"
    """What to do with an example longer than a row: drop and count it, truncate it, or stop."""
    num_workers: int = 1
    """Processes that read rows, per rank."""
    prepared_dir: str = "prepared"
    """Where JSONL sources are prepared to, and packings cached."""
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    """Name -> source, in the order of their dataset_id."""

    def __post_init__(self) -> None:
        _positive(self, "data", "seq_length")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        _one_of("data.overlong", self.overlong, Overlong)
        _one_of("data.template", self.template, Template)


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How the weights change."""

    strategy: StrategyName = "gate-load"
    interval: int = 100
    """Iterations between two weight updates (the paper's m)."""
    signal: SignalName = "probe"
    """Where gate loads are measured: on held-out rows, or while training."""
    probe_tokens: int = 16384
    """Positions of each source's held-out rows that a probe reads; the same ones every time."""
    eta: float = 10.0
    """Step size of an update."""
    smoothing: float = 0.05
    """Share of the weights that is spread evenly (the paper's c)."""
    metric: str = "l2"
    aggregate: str = "mean"
    layers: str | tuple[int, ...] = "last"
    """MoE layers whose loads count: `last`, `all` or a list of indices."""

    def __post_init__(self) -> None:
        _one_of("mixing.strategy", self.strategy, StrategyName)
        _one_of("mixing.signal", self.signal, SignalName)
        _positive(self, "mixing", "interval", "probe_tokens")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and precision."""

    train_iters: int | None = None
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    rampup_batch_size: tuple[int, ...] | None = None
    """Start, increment and samples: the batch grows to `global_batch_size` over so many samples."""
    seed: int = 1234
    bf16: bool = False
    """Parameters and activations in bfloat16, master weights and gradients in float32."""
    nonfinite: Nonfinite = "stop"
    """At a loss or gradient that is not finite: stop at the last good state, or skip the batch."""

    def __post_init__(self) -> None:
        _positive(self, "training", "train_iters", "micro_batch_size", "global_batch_size")
        ramp = self.rampup_batch_size
        good = ramp is None or (len(ramp) == 3 and min(ramp) > 0)
        _require(good, "training.rampup_batch_size", ramp, "START INCREMENT SAMPLES, each 1 or more")
        _require(self.seed >= 0, "training.seed", self.seed, "0 or more")
        _one_of("training.nonfinite", self.nonfinite, Nonfinite)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Learning rate and its schedule; any field of Megatron-Core's `OptimizerConfig` may stand beside."""

    lr: float = 2.0e-5
    min_lr: float = 0.0
    lr_decay_style: DecayStyle = "cosine"
    lr_decay_iters: int | None = None
    """Iterations until `min_lr`; `train_iters` if not given."""
    lr_warmup_iters: int = 0
    weight_decay: float = 0.0
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Megatron-Core's `OptimizerConfig`."""

    def __post_init__(self) -> None:
        _positive(self, "optimizer", "lr", "lr_decay_iters")
        _require(0 <= self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"from 0 to lr ({self.lr})")
        _require(self.lr_warmup_iters >= 0, "optimizer.lr_warmup_iters", self.lr_warmup_iters, "0 or more")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _one_of("optimizer.lr_decay_style", self.lr_decay_style, DecayStyle)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run, and what it starts from."""

    save_interval: int | None = None
    """Iterations between two checkpoints; one is always written at the end."""
    pretrained_checkpoint: str | None = None
    """Checkpoint folder (the parent of `iter_*`) whose weights a fresh run starts from."""
    async_save: bool = False
    """Write checkpoints beside the training that goes on."""
    keep_last: int | None = None
    """Checkpoints that are kept, the newest ones; all if not given."""
    on_save_error: OnSaveError = "stop"
    """What a checkpoint that cannot be written does to the run; the last one always ends it."""

    def __post_init__(self) -> None:
        _positive(self, "checkpoint", "save_interval", "keep_last")
        _one_of("checkpoint.on_save_error", self.on_save_error, OnSaveError)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """How much is said."""

    log_interval: int = 10
    """Iterations between two log lines."""

    def __post_init__(self) -> None:
        _positive(self, "logging", "log_interval")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
