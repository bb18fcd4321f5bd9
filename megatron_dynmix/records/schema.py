"""What a run puts on record: the one definition of every line of its files.

A field is a key of the line. `from_json` refuses a line that is not as it is defined here; `salvaged` takes
what can be read of it, for those who have to show a run that is damaged, old, or still being written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.data.source_set import SourceSet
from megatron_dynmix.mixing.expert_use import ExpertUse
from megatron_dynmix.mixing.guardrails import Override
from megatron_dynmix.mixing.strategy import Remark

AnyLine = TypeVar("AnyLine", bound="Line")
Why = Literal["start", "update", "sources changed"]
EventKind = Literal["start", "resume", "finished", "stopped", "failed"]


class Line:
    """A record that is one line of a file."""

    MAY_LACK: ClassVar[str | None] = None
    """The one field that its line may be without."""
    iteration: int

    def to_json(self) -> dict[str, Any]:
        """Return the line in JSON's own types, every float to the bit; NaN and infinities are strings."""
        return cast(dict[str, Any], plain(self))

    @classmethod
    def from_json(cls: type[AnyLine], record: Mapping[str, Any]) -> AnyLine:
        """Read a line back; ValueError names the first key that is not as `to_json` writes it."""
        return cast(AnyLine, _read(cls, record))

    @classmethod
    def salvaged(cls: type[AnyLine], record: Mapping[str, Any]) -> AnyLine:
        """Read what can be read of a line; the rest is NaN, None or empty."""
        values, line = {}, cast(Any, cls)  # a type is hashable, whatever mypy thinks of type[AnyLine]
        for name, kind in _kinds(line).items():
            try:
                values[name] = _read(kind, record[name])
            except (KeyError, TypeError, ValueError, OverflowError):
                values[name] = _nothing(kind)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(Line):
    """What was seen in a log interval: a line of `metrics.jsonl`. Losses are in nats per trained token."""

    iteration: int
    consumed_samples: int
    lm_loss: float
    source_loss: dict[str, float | None]
    """None for a source that was not drawn."""
    lr: float
    grad_norm: float
    global_batch_size: int
    seconds: float
    """Per iteration."""
    tokens_per_second: float
    useful_token_share: float
    tokens: dict[str, int]
    """Trained on since the start of the run."""
    skipped_iterations: int
    aux_losses: dict[str, float]
    """By Megatron-LM's names."""

    @property
    def losses(self) -> dict[str, float]:
        """`source_loss`, with NaN for a source that was not drawn."""
        return {name: math.nan if loss is None else loss for name, loss in self.source_loss.items()}


def step_seconds(metrics: Sequence[TrainingRecord]) -> float:
    """Return the seconds of all training steps; what is not known of a log interval counts as none."""
    total, before = 0.0, 0
    for record in metrics:
        seconds = record.seconds * (record.iteration - before)
        total += seconds if math.isfinite(seconds) else 0.0
        before = record.iteration
    return total


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What strategies were told for an update, beside counts, losses and what the ledger says."""

    MAY_LACK: ClassVar[str | None] = "stale"
    train_iters: int
    interval_rows: int
    run_rows: int
    num_layers: int
    """MoE layers of the model; 0 where no counts were measured."""
    stale: list[int] = field(default_factory=list)
    """The dataset_ids whose counts are the last known ones, which an earlier update had."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Where in `signals.bin` the arrays of an update are."""

    offset: int
    size: int
    """Bytes."""
    digest: str
    """SHA-256."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MixingUpdate(Line):
    """A weight update: a line of `mixing.jsonl`, and a block of `signals.bin` for its large arrays.

    Axes: H halves, D sources, L MoE layers, E experts.
    """

    MAY_LACK = "counts"
    iteration: int
    """Iterations done when it was made."""
    consumed_samples: int
    sources: list[str]
    """D names, in the order of every list here."""
    old_weights: list[float]
    """Shares of the rows before."""
    new_weights: list[float]
    delta: list[float] | None = None
    """Scores; None if no strategy was asked."""
    load: NDArray[np.float64] | None = None
    """Gate loads, `[D, E]` of one layer or `[D, L, E]` of those that the strategy reads."""
    distance: NDArray[np.float64] | None = None
    """`[D, D]`."""
    tokens: list[int]
    """Trained on since the start of the run, as rows and epochs are counted from there."""
    rows: list[int]
    epochs: list[float]
    seconds: dict[str, float]
    """Wall time of each phase: signal, reduce, update, rebuild."""
    notes: list[Remark] = field(default_factory=list)
    """What a reader must know about this update."""
    events: list[Remark] = field(default_factory=list)
    """What guardrails and the operator's override did to the strategy's proposal."""
    override: Override | None = None
    """The operator's word in force."""
    shadow: dict[str, list[float]] = field(default_factory=dict)
    """Weights that each strategy which only watches would have."""
    loss: list[float] | None = None
    """Mean losses in nats as the strategies saw them; NaN for a source that was never measured."""
    delta_error: list[float] | None = None
    """Standard errors of delta."""
    signal: Measured | None = None
    """None if no strategy was asked."""
    block: Block | None = None
    """Where the arrays are that the line does not hold."""
    example_weights: list[float] | None = None
    """With `unit: examples`, the weights as shares of the examples."""
    expert_use: ExpertUse | None = None
    """How evenly the mix in force uses the experts; None where it was not measured."""
    probe_loss: list[float | None] | None = None
    """Mean losses in nats on held-out rows; None for a source without a trained token."""
    entropy: float
    """Entropy of the new weights, in nats."""
    kl_step: float
    """KL divergence of the new weights from the old, in nats."""
    counts: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Routed tokens: `half_counts` `[H, D, L, E]`, and `counts` `[D, L, E]` unless they are its sum."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is kept outside the line."""
        large = {} if self.load is None or self.load.ndim < 3 else {"load": self.load}
        return {**self.counts, **large}

    def with_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> MixingUpdate:
        """Return the update with what is kept outside its line."""
        counts = {name: array for name, array in arrays.items() if name != "load"}
        return replace(self, counts=counts, load=arrays.get("load", self.load))

    def to_json(self) -> dict[str, Any]:
        """Return the line in JSON's own types, without its arrays."""
        line = {item.name: plain(getattr(self, item.name)) for item in fields(self) if item.name != "counts"}
        return line if "load" not in self.arrays else {**line, "load": None}


@dataclass(frozen=True, kw_only=True)
class StageLine(Line):
    """What it takes to draw a stage again, and why it began: a line of `ledger.jsonl`."""

    MAY_LACK = "begin"
    kind: Literal["stage"] = "stage"
    why: Why
    iteration: int
    """Iterations done; for changed sources the first iteration that draws from them."""
    start_sample: int
    sources: list[str]
    sizes: list[int]
    weights: list[float]
    seed: int
    chunk_size: int
    drawn: list[int]
    """Rows of each source before the stage."""
    owed: list[float]
    """What rounding owes each source."""
    fingerprints: list[str]
    mixing: dict[str, Any]
    """The settings that the weights came from, as `MixingConfig.flat` gives them."""
    resolved: dict[str, Any]
    """What those say by file and by source."""
    changes: list[str] = field(default_factory=list)
    """What became of each source, where they changed."""
    begin: dict[str, Any] = field(default_factory=dict)
    """What the first weights of a run came from, see `begin_of`; empty for other stages."""

    @property
    def source_set(self) -> SourceSet:
        """Its sources, with all that tells them from others."""
        return SourceSet(
            names=tuple(self.sources), fingerprints=tuple(self.fingerprints), sizes=tuple(self.sizes)
        )

    @property
    def settings(self) -> MixingConfig:
        """`mixing` as a configuration; `InputError` for a setting that there is not."""
        return MixingConfig.from_flat(self.mixing)

    def to_json(self) -> dict[str, Any]:
        """Return the line in JSON's own types; `begin` only where there is one."""
        return {name: value for name, value in super().to_json().items() if name != "begin" or value}


@dataclass(frozen=True, kw_only=True)
class SamplesLine(Line):
    """What was trained on in a log interval: a line of `ledger.jsonl`."""

    kind: Literal["samples"] = "samples"
    iteration: int
    first_sample: int
    consumed_samples: int
    digest: str
    """Digest of samples first_sample <= i < consumed_samples, see `DrawnSamples`; 16 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class Event(Line):
    """A start or an end of the processes that train: a line of `events.jsonl`."""

    iteration: int
    event: EventKind
    time: str
    """UTC, as ISO 8601."""
    version: str
    ranks: int
    notes: list[str]
    """Changed settings, checkpoints that were not good; what a run ended with."""


def plain(value: Any) -> Any:
    """Return a value in JSON's own types."""
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


@cache
def _kinds(cls: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def _read(kind: Any, value: Any) -> Any:
    """Return a value of JSON as one of a field's type; TypeError or ValueError if it is none."""
    if kind is float:
        if type(value) in (float, int) or value in ("NaN", "Infinity", "-Infinity"):
            return float(value)
        raise ValueError(f"{value!r} is no number")
    if kind is Any:
        return value
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        assert len(parts) == 2 and parts[1] is NoneType, "a value, or None"
        return None if value is None else _read(parts[0], value)
    if origin is Literal and value not in parts:
        raise ValueError(f"{value!r} is none of {', '.join(map(repr, parts))}")
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_read(parts[0], item) for item in value)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {str(name): _read(parts[1], item) for name, item in value.items()}
    if origin in (np.ndarray, NDArray):  # from NumPy 2.5 on it is a type of its own
        return np.array(value, np.float64)
    if hasattr(kind, "__dataclass_fields__") and isinstance(value, Mapping):
        absent = getattr(kind, "MAY_LACK", None)
        names = {name: part for name, part in _kinds(kind).items() if name != absent or name in value}
        return kind(**{name: _read_key(part, value, name) for name, part in names.items()})
    if origin is Literal or type(value) is kind:
        return value
    raise ValueError(f"{value!r} is no {getattr(origin or kind, '__name__', kind)}")


def _read_key(kind: Any, record: Mapping[str, Any], name: str) -> Any:
    try:
        return _read(kind, record[name])
    except KeyError:
        raise ValueError(f"it has no {name!r}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _nothing(kind: Any) -> Any:
    """Return what stands for a value of a type that cannot be read."""
    empty = {float: math.nan, int: 0, str: "", Literal: "", list: [], tuple: (), dict: {}, Mapping: {}}
    return empty.get(get_origin(kind) or kind)
