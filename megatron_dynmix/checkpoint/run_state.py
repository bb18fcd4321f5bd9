"""`run_state.json`: what a checkpoint knows beside its tensors; only this file knows how it is written.

Axes: D sources, H halves, L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dynmix.config.batch_schedule import Pairs
from megatron_dynmix.data.blend_plan import BlendState
from megatron_dynmix.data.source_set import Prints
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.controller import ControllerState

RUN_STATE = "run_state.json"
FORMAT_VERSION = 4


class Damaged(Exception):
    """A file of a checkpoint is not what was written; the message names it, what is expected and found."""


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int
    """Iterations done."""
    consumed_samples: int
    tokens_D: torch.Tensor
    """Tokens of each source trained on so far, float64 (exact)."""
    skipped_in_row: int = 0
    """Batches just before that were not finite and changed nothing."""
    batches: Pairs = ()
    """Those done, as (iterations, batch size), the first ones first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MixState:
    """The mix, and what the running interval has seen so far, summed over all ranks."""

    blend: BlendState
    controller: ControllerState
    strategy: str
    """Whose state the controller's is."""
    overridden: bool
    """Whether the operator has set the weights in force."""
    interval_counts: NDArray[np.int64]
    """`[H, D, L, E]`."""
    interval_stats: SourceStats


@dataclass
class LogInterval:
    """What was seen since the last log line; kept, so that no iteration goes unrecorded."""

    stats: SourceStats
    iterations: int = 0
    samples: int = 0
    seconds: float = 0.0
    skipped: int = 0
    micro_batches_here: int = 0
    """Those of this rank and process, not kept: Megatron-Core's own trackers do not survive a restart."""

    def to_json(self) -> dict[str, Any]:
        """Return all but what is not kept."""
        return {name: value for name, value in vars(self).items() if name != "micro_batches_here"}


@dataclass(frozen=True, kw_only=True)
class DrawnState:
    """The samples trained on since the last line of the ledger."""

    first_sample: int
    digest: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopState:
    """How far a run whose mix changes has come, whoever's loop it is."""

    progress: Progress
    mix: MixState
    log_interval: LogInterval
    drawn: DrawnState

    def to_json(self) -> dict[str, Any]:
        """Return it in JSON types; reading it gives the same bits back."""
        parts = {name: vars(self)[name] for name in LOOP}
        plain: dict[str, Any] = json.loads(json.dumps(parts, default=_plain))
        return plain

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LoopState:
        """Read what `to_json` gave."""
        progress, mix, log_interval = (dict(record[part]) for part in LOOP[:3])
        progress |= {"tokens_D": torch.tensor(progress["tokens_D"], dtype=torch.float64)}
        progress["batches"] = tuple((count, size) for count, size in progress["batches"])
        log_interval |= {"stats": SourceStats.of(np.array(log_interval["stats"]))}
        mix |= {
            "blend": BlendState.from_json(mix["blend"]),
            "controller": ControllerState.from_json(mix["controller"]),
            "interval_counts": np.array(mix["interval_counts"], np.int64),
            "interval_stats": SourceStats.of(np.array(mix["interval_stats"])),
        }
        return cls(
            progress=Progress(**progress),
            mix=MixState(**mix),
            log_interval=LogInterval(**log_interval),
            drawn=DrawnState(**record["drawn"]),
        )


LOOP = tuple(part.name for part in fields(LoopState))


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedModel:
    """What every checkpoint says; of converted weights there is no more to say."""

    config: Mapping[str, Any]
    """Settings by section: all of a run, or the model's alone of converted weights."""

    def text(self) -> str:
        """Return the content of the file; reading it gives the same bits back."""
        return json.dumps({"format_version": FORMAT_VERSION, **vars(self)}, default=_plain)


@dataclass(frozen=True, kw_only=True, eq=False)
class Identity(SavedModel):
    """What makes a run this one: its configuration, and what its sources hold."""

    fingerprints: Prints
    probes: Prints
    """Held-out source -> checksums of its files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunState(LoopState, Identity):
    """All of a run's state that is not a tensor of model or optimizer."""

    good: int | None = None
    """Iteration of the newest checkpoint from which an iteration was trained."""


def read_saved(folder: Path) -> SavedModel:
    """Read what a checkpoint says: a `RunState`, unless its weights were converted.

    Raise `Damaged` if it cannot be read, and `InputError` if it is of another version.
    """
    try:
        values = json.loads((folder / RUN_STATE).read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{RUN_STATE} cannot be read ({error})") from None
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise Damaged(f"{RUN_STATE} is no run state")
    if version != FORMAT_VERSION:
        age, remedy = "a newer", "update megatron-dynmix"
        if version < FORMAT_VERSION:
            age = "an older"
            remedy = "resume with that version, or export the weights with it and begin a run from them"
        raise InputError(
            f"{folder} was written by {age} version (format {version}, this one reads {FORMAT_VERSION}); "
            f"{remedy}"
        )
    try:
        return _saved(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{RUN_STATE} is no run state ({type(error).__name__}: {error})") from None


def read_run_state(folder: Path) -> RunState:
    """Read the run state of a checkpoint, as `read_saved` does; refuse converted weights."""
    saved = read_saved(folder)
    if not isinstance(saved, RunState):
        raise InputError(
            f"{folder} holds converted weights, not the state of a run; begin a run from them: "
            f"--pretrained-checkpoint {folder.parent}"
        )
    return saved


def _saved(values: dict[str, Any]) -> SavedModel:
    if "mix" not in values:
        return SavedModel(**values)
    loop = LoopState.from_json({part: values.pop(part) for part in LOOP})
    return RunState(**vars(loop), **values)


def _plain(part: Any) -> Any:
    """Return an array, or a part of the state, as what JSON knows."""
    if isinstance(part, np.ndarray | torch.Tensor):
        return part.tolist()
    if isinstance(part, SourceStats):
        return part.sums.tolist()
    return part.to_json() if hasattr(part, "to_json") else vars(part)
