"""What a report reads of a run directory, whatever state that is in.

What cannot be read is said, left out, and nothing else is lost: a report has to show a run that was killed,
or that goes on while it is looked at.

Axes: F frames, R rows, C columns of a heat map; D sources, L layers, E experts.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.expert_use import ExpertUse
from megatron_dynmix.records.jsonl import count_lines, found_records
from megatron_dynmix.records.schema import Event, MixingUpdate, StageLine, TrainingRecord, step_seconds
from megatron_dynmix.records.signals import SIGNALS, with_signal
from megatron_dynmix.report import REPORT

MARKED = ("resume", "override", "fault", "sources")
"""Kinds that are few and change a run; guardrails act at every update of some runs."""


@dataclass(frozen=True)
class Entry:
    """Something that happened to a run, for the table and the marks of its page."""

    iteration: int
    kind: str
    text: str


def entries_of(
    events: Sequence[Event], metrics: Iterable[TrainingRecord], stages: Iterable[StageLine]
) -> list[Entry]:
    """Return what the records but those of updates tell."""
    entries = []
    for event in events:
        time = event.time.replace("T", " ").replace("+00:00", " UTC")
        kind = "fault" if event.event == "failed" else event.event
        text = "; ".join(part for part in (time, *event.notes) if part)
        entries.append(Entry(event.iteration, kind, text))
    for event, after in itertools.pairwise(events):
        if event.event in ("start", "resume") and after.event in ("start", "resume"):
            text = "the processes before ended without a word: killed, interrupted, or the machine was lost"
            entries.append(Entry(after.iteration, "fault", text))
    for record in metrics:
        if (skipped := record.skipped_iterations) > 0:
            text = f"{skipped} iterations changed nothing: their loss or gradients were not finite"
            entries.append(Entry(record.iteration, "fault", text))
    for stage in stages:
        if stage.why == "sources changed":
            entries.append(Entry(stage.iteration, "sources", "; ".join(stage.changes) or stage.why))
    return entries


MOST_FRAMES = 60
MOST_CELLS = 1_500_000
"""Cells in all frames of a heat map; one byte each."""
COLOURED = 0.995
"""Share of the values in a run's second half that the colours tell apart: its first loads may be far from
all others."""
MOST_COLUMNS = 256
"""Columns of gate loads; a model with more experts in all its layers is shown by the mean over its layers."""


@dataclass(frozen=True)
class Frame:
    """One heat map."""

    iteration: int
    sources: tuple[str, ...]
    values_RC: NDArray[np.float64]


def by_name(sources: Sequence[str], values: Sequence[float] | None) -> dict[str, float]:
    """Return values by name of the source; none where a record has none, or not one for each."""
    known = values is not None and len(values) == len(sources)
    return dict(zip(sources, values or (), strict=True)) if known else {}


def thinned(length: int, most: int) -> list[int]:
    """Return at most `most` of the places 0 ... length - 1, evenly spread, both ends among them."""
    if length <= most:
        return list(range(length))
    return [round(place * (length - 1) / (most - 1)) for place in range(most)]


def flat_load(load: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gate loads `[D, E]`, or `[D, L, E]` with the layers side by side, as `[D, C]`."""
    if load.ndim == 2 or load.shape[1] * load.shape[2] <= MOST_COLUMNS:
        return load.reshape(len(load), -1)
    mean_DE: NDArray[np.float64] = load.mean(axis=1)
    return mean_DE


def quantised(frames: Sequence[Frame]) -> dict[str, Any] | None:
    """Return frames as the page reads them: 0 to 255 for 0 to the largest value of all, in base64.

    Frames of other sources or experts than the last are `left_out`: they have other axes. `shape` is
    [F, R, C], `most` the value of 255, `coloured_most` that of the last colour.
    """
    if not frames:
        return None
    last = frames[-1]
    axes = (last.sources, last.values_RC.shape)
    alike = [frame for frame in frames if (frame.sources, frame.values_RC.shape) == axes]
    values_FRC = np.nan_to_num(np.stack([frame.values_RC for frame in alike]), posinf=0.0, neginf=0.0)
    most = float(values_FRC.max()) or 1.0
    bytes_FRC = np.rint(values_FRC.clip(min=0) * (255 / most)).astype(np.uint8)
    return {
        "iterations": [frame.iteration for frame in alike],
        "shape": list(bytes_FRC.shape),
        "most": most,
        "coloured_most": float(np.quantile(values_FRC[len(alike) // 2 :], COLOURED)) or most,
        "sources": list(last.sources),
        "bytes": base64.b64encode(bytes_FRC.tobytes()).decode("ascii"),
        "left_out": len(frames) - len(alike),
    }


FILES = ("config.yaml", "mixing.jsonl", "metrics.jsonl", "ledger.jsonl", "events.jsonl")
FOLDERS = ("checkpoints", "tensorboard")
MOST_POINTS = 400
"""Points of a curve: more cannot be told apart on a screen."""
PHASES = ("signal", "reduce", "update", "rebuild")


@dataclass(frozen=True)
class Weights:
    """Shares of the rows drawn from an iteration on, by name of the source."""

    iteration: int
    shares: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Update:
    """A weight update without its heat maps."""

    iteration: int
    delta: Mapping[str, float]
    delta_error: Mapping[str, float]
    epochs: Mapping[str, float]
    rows: Mapping[str, float]
    seconds: Mapping[str, float]
    entropy: float
    kl_step: float
    use: ExpertUse | None = None


@dataclass(kw_only=True)
class Run:
    """Everything that a page says of one run."""

    path: Path
    name: str
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config_text: str = ""
    weights: list[Weights] = field(default_factory=list)
    metrics: list[TrainingRecord] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    load_frames: list[Frame] = field(default_factory=list)
    distance_frames: list[Frame] = field(default_factory=list)
    load_axis: str = "expert"
    """What the columns of the gate loads are."""
    events: list[Entry] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""
    written: float | None = None
    """When a record was last written, in seconds since 1970."""

    def setting(self, section: str, name: str) -> Any:
        """Return what the configuration says; None if it does not."""
        return self.config.get(section, {}).get(name)

    @property
    def keeps_weights(self) -> bool:
        """Whether an update was due and the ledger knows of none: the strategy never changes them."""
        interval = self.setting("mixing", "interval")
        if self.updates or not isinstance(interval, int) or not 0 < interval < self.iteration:
            return False
        first = self.weights[0].shares if self.weights else {}
        return bool(first) and all(point.shares == first for point in self.weights)

    @property
    def sources(self) -> list[str]:
        """All that the run ever drew from, in their order; those of the configuration if nothing is known."""
        names: dict[str, None] = {}
        for weights in self.weights:
            names |= dict.fromkeys(weights.shares)
        for record in self.metrics[-1:]:
            names |= dict.fromkeys(record.source_loss)
        configured = self.setting("data", "sources")
        return list(names) or (list(map(str, configured)) if isinstance(configured, dict) else [])

    @property
    def iteration(self) -> int:
        """The last one on record."""
        ends = [record.iteration for record in self.metrics[-1:]]
        return max(ends + [update.iteration for update in self.updates[-1:]], default=0)

    @property
    def train_iters(self) -> int | None:
        """How far it is to go."""
        total = self.setting("training", "train_iters")
        return total if isinstance(total, int) else None

    @property
    def is_finished(self) -> bool:
        """Whether its last iteration is on record."""
        return self.train_iters is not None and self.iteration >= self.train_iters

    @property
    def step_seconds(self) -> float:
        """Seconds of all training steps."""
        return step_seconds(self.metrics)

    @property
    def mixing_seconds(self) -> float:
        """Seconds of all weight updates."""
        return sum(value for update in self.updates for value in update.seconds.values() if value > 0)


def read_run(path: Path) -> Run:
    """Read a run directory; `InputError` if it is none: not there, not a folder, or full of other things."""
    _check(path)
    run = Run(path=path, name=path.resolve().name)
    if not any(found.name != REPORT for found in path.iterdir()):
        run.missing.append("The directory is empty: the run has not begun to write")
        return run
    _read_config(run)
    _read_updates(run)
    found = partial(found_records, say=run.missing.append)
    run.metrics = [TrainingRecord.salvaged(line) for line in found(path / "metrics.jsonl")]
    ledger = found(path / "ledger.jsonl")
    stages = [StageLine.salvaged(line) for line in ledger if line.get("kind") == "stage"]
    if stages:
        run.weights = [Weights(line.iteration, by_name(line.sources, line.weights)) for line in stages]
    events = path / "events.jsonl"
    starts_and_ends = [Event.salvaged(line) for line in found(events)] if events.exists() else []
    run.events = [*entries_of(starts_and_ends, run.metrics, stages), *run.events]
    run.events.sort(key=lambda entry: entry.iteration)
    files = [path / name for name in FILES if name.endswith("jsonl")]
    run.written = max((file.stat().st_mtime for file in files if file.is_file()), default=None)
    if run.keeps_weights:
        run.missing = [said for said in run.missing if said != "mixing.jsonl is empty"]
    return run


def _check(path: Path) -> None:
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise InputError(f"{path} is {what}; give the --run-dir of a run")
    inside = sorted(found.name for found in path.iterdir())
    if set(inside) - {REPORT} and not set(inside) & {*FILES, *FOLDERS}:
        held = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
        runs = [str(path / name) for name in inside if any((path / name / file).is_file() for file in FILES)]
        which = f", such as {', '.join(runs[:3])}" if runs else ""
        raise InputError(
            f"{path} is no run directory: it holds {held}, and neither config.yaml nor mixing.jsonl nor "
            f"metrics.jsonl; give the --run-dir of a run{which}"
        )


def _read_config(run: Run) -> None:
    """Read the configuration as it stands: a page must not need that this version would accept it."""
    path = run.path / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except FileNotFoundError:
        run.missing.append("config.yaml is missing, so neither settings nor the planned length are known")
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        run.missing.append(f"config.yaml cannot be read: {str(error).splitlines()[0]}")
        return
    run.config_text = text
    if isinstance(config, dict):
        run.config = {str(name): held for name, held in config.items() if isinstance(held, dict)}
    if not {"data", "mixing", "training"} <= set(run.config):
        run.missing.append("config.yaml has not the sections of this version's configuration")


def _read_updates(run: Run) -> None:
    """Read updates in one pass, of which only a few keep their heat maps."""
    path = run.path / "mixing.jsonl"
    total = count_lines(path)
    frames = set(thinned(total, MOST_FRAMES))
    odd, lost = 0, []
    for place, record in enumerate(found_records(path, run.missing.append)):
        update = MixingUpdate.salvaged(record)
        sources, new = update.sources, by_name(update.sources, update.new_weights)
        if not new:
            odd += 1
            continue
        if place in frames and update.load is None and update.block is not None:
            try:
                update = with_signal(update, run.path / SIGNALS)
            except InputError as error:
                lost.append(str(error))
        load = update.load if place in frames else None
        if load is not None and (load.ndim not in (2, 3) or len(load) != len(new) or not load.size):
            load = None
        if not run.weights:
            run.weights.append(Weights(0, by_name(sources, update.old_weights)))
        run.weights.append(Weights(update.iteration, new))
        run.updates.append(_update(update))
        for event in update.events:
            kind = "override" if event.kind == "override" else "guardrail"
            run.events.append(Entry(update.iteration, kind, event.text))
        for note in update.notes:
            kind = "fault" if note.kind == "override_unusable" else "note"
            run.events.append(Entry(update.iteration, kind, note.text))
        if place in frames:
            _add_frames(run, update, load, tuple(new))
    run.load_frames, run.distance_frames = _few(run.load_frames), _few(run.distance_frames)
    if odd:
        run.missing.append(
            f"mixing.jsonl: {odd} records, as of another version, have no weight for each source; left out"
        )
    if lost:
        run.missing.append(
            f"{lost[0]}; so are those of {len(lost) - 1} more updates" if lost[1:] else lost[0]
        )


def _update(update: MixingUpdate) -> Update:
    named = {
        name: by_name(update.sources, getattr(update, name))
        for name in ("delta", "delta_error", "epochs", "rows")
    }
    return Update(
        **named,
        iteration=update.iteration,
        seconds=update.seconds,
        entropy=update.entropy,
        kl_step=update.kl_step,
        use=update.expert_use,
    )


def _add_frames(
    run: Run, update: MixingUpdate, load: NDArray[np.float64] | None, sources: tuple[str, ...]
) -> None:
    iteration = update.iteration
    if load is not None:
        run.load_frames.append(Frame(iteration, sources, flat_load(load)))
        if load.ndim == 3:
            averaged = run.load_frames[-1].values_RC.shape[1] < load[0].size
            how = f"mean of {load.shape[1]} layers" if averaged else f"{load.shape[1]} layers side by side"
            run.load_axis = f"expert ({how})"
    distance_DD = update.distance
    if distance_DD is not None and distance_DD.shape == (len(sources), len(sources)):
        run.distance_frames.append(Frame(iteration, sources, distance_DD))


def _few(frames: list[Frame]) -> list[Frame]:
    """As many of the frames as a page can hold."""
    most = max(2, MOST_CELLS // frames[-1].values_RC.size) if frames else 0
    return [frames[place] for place in thinned(len(frames), most)]


def end_weights(run: Run) -> Mapping[str, float]:
    """Return the shares after the last update, by name of the source."""
    return run.weights[-1].shares if run.weights else {}


def end_losses(run: Run) -> Mapping[str, float]:
    """Return the last that was recorded of each source."""
    found: dict[str, float] = {}
    for record in run.metrics:
        found |= {name: loss for name, loss in record.losses.items() if math.isfinite(loss)}
    return found
