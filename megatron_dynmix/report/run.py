"""Things that happened to a run, for the table and the marks of its page.

Heat maps over the updates: a few of them as bytes, so that a page of thousands of updates stays small.

Axes: F frames, R rows, C columns of a heat map; D sources, L layers, E experts.

What a report reads of a run directory, whatever state that is in.

Axes: D sources, L layers, E experts.

Where a run has come to: the last weight and the last loss of each source.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_dynmix.errors import InputError
from megatron_dynmix.report import REPORT
from megatron_dynmix.report.records import by_source, count_lines, number, read_lines, thinned

MARKED = ("resume", "override", "fault", "sources")
"""Kinds that are few and change a run; guardrails act at every update of some runs."""


@dataclass(frozen=True)
class Event:
    """One thing."""

    iteration: int
    kind: str
    text: str


def events_of(
    lifecycle: Sequence[Mapping[str, Any]],
    metrics: Iterable[Mapping[str, Any]],
    stages: Iterable[Mapping[str, Any]],
) -> list[Event]:
    """What the records but those of updates tell.

    Args:
        lifecycle: lines of `events.jsonl`: starts, resumes and ends of the training processes.
        metrics: of log intervals.
        stages: lines of the ledger that begin a stage.

    """
    events = [
        Event(line["iteration"], _kind(str(line.get("event"))), _lifecycle_text(line)) for line in lifecycle
    ]
    for line, after in itertools.pairwise(lifecycle):
        if line.get("event") in ("start", "resume") and after.get("event") in ("start", "resume"):
            text = "the processes before ended without a word: killed, interrupted, or the machine was lost"
            events.append(Event(after["iteration"], "fault", text))
    for record in metrics:
        if (skipped := number(record.get("skipped_iterations"))) > 0:
            text = f"{skipped:.0f} iterations changed nothing: their loss or gradients were not finite"
            events.append(Event(record["iteration"], "fault", text))
    for stage in stages:
        if stage.get("why") == "sources changed":
            changes = stage.get("changes")
            text = "; ".join(map(str, changes)) if isinstance(changes, list) else "sources changed"
            events.append(Event(stage["iteration"], "sources", text))
    return events


def _kind(event: str) -> str:
    return "fault" if event == "failed" else event


def _lifecycle_text(line: Mapping[str, Any]) -> str:
    """Time, what is said of it, and what was found."""
    notes = line.get("notes")
    time = str(line.get("time", "")).replace("T", " ").replace("+00:00", " UTC")
    said = [time, *(map(str, notes) if isinstance(notes, list) else [])]
    return "; ".join(text for text in said if text)


MOST_FRAMES = 60
MOST_CELLS = 1_500_000
"""Of all frames of a heat map; one byte each."""
COLOURED = 0.995
"""Share of the values in a run's second half that the colours tell apart: its first loads may be far from
all others."""
MOST_COLUMNS = 256
"""Of gate loads; a model with more experts in all its layers is shown by the mean over its layers."""


@dataclass(frozen=True)
class Frame:
    """One heat map."""

    iteration: int
    sources: tuple[str, ...]
    values_RC: NDArray[np.float64]


def array(values: Any, sources: int) -> NDArray[np.float64] | None:
    """Numbers of a record with one entry per source, at least 2 axes; None if they are not that."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return found if found.ndim >= 2 and len(found) == sources and found.size else None


def flat_load(load: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gate loads `[D, E]`, or `[D, L, E]` with the layers side by side, as `[D, C]`."""
    if load.ndim == 2 or load.shape[1] * load.shape[2] <= MOST_COLUMNS:
        return load.reshape(len(load), -1)
    mean_DE: NDArray[np.float64] = load.mean(axis=1)
    return mean_DE


def quantised(frames: Sequence[Frame]) -> dict[str, Any] | None:
    """Frames as the page reads them: 0 to 255 for 0 to the largest value of all, in base64.

    Frames of other sources or experts than the last are left out: they have other axes. The keys:
    `iterations`, `shape` [F, R, C], `most` (the value of 255),
    `coloured_most` (the value of the last colour), `sources`, `bytes`, `left_out`.
    """
    if not frames:
        return None
    last = frames[-1]
    alike = [
        frame
        for frame in frames
        if frame.sources == last.sources and frame.values_RC.shape == last.values_RC.shape
    ]
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
"""Of a curve: more cannot be told apart on a screen."""
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
    imbalance: tuple[float, ...] = ()
    """Largest over mean load of the experts, for each layer, of the mix; only of updates that are drawn."""


@dataclass(kw_only=True)
class Run:
    """Everything that a page says of one run."""

    path: Path
    name: str
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config_text: str = ""
    weights: list[Weights] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    load_frames: list[Frame] = field(default_factory=list)
    distance_frames: list[Frame] = field(default_factory=list)
    load_axis: str = "expert"
    """What the columns of the gate loads are."""
    events: list[Event] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""
    written: float | None = None
    """When a record was last written, in seconds since 1970."""

    def setting(self, section: str, name: str) -> Any:
        """What the configuration says; None if it does not."""
        return self.config.get(section, {}).get(name)

    @property
    def keeps_weights(self) -> bool:
        """Whether an update was due and the ledger knows of none: the strategy never changes them."""
        interval = self.setting("mixing", "interval")
        is_due = isinstance(interval, int) and 0 < interval < self.iteration
        first = self.weights[0].shares if self.weights else None
        return (
            is_due
            and not self.updates
            and all(point.shares == first for point in self.weights)
            and bool(first)
        )

    @property
    def sources(self) -> list[str]:
        """All that the run ever drew from, in their order; those of the configuration if nothing is known."""
        names: dict[str, None] = {}
        for weights in self.weights:
            names |= dict.fromkeys(weights.shares)
        for record in self.metrics[-1:]:
            names |= dict.fromkeys(by_source(record.get("source_loss"), None))
        configured = self.setting("data", "sources")
        return list(names) or (list(map(str, configured)) if isinstance(configured, dict) else [])

    @property
    def iteration(self) -> int:
        """The last one on record."""
        ends = [self.metrics[-1]["iteration"]] if self.metrics else []
        ends += [self.updates[-1].iteration] if self.updates else []
        return int(max(ends, default=0))

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
        """Of all training steps; a record holds the mean over the iterations since the one before."""
        total, before = 0.0, 0
        for record in self.metrics:
            seconds = number(record.get("seconds")) * (record["iteration"] - before)
            total += seconds if math.isfinite(seconds) else 0.0
            before = record["iteration"]
        return total

    @property
    def mixing_seconds(self) -> float:
        """Of all weight updates."""
        return sum(value for update in self.updates for value in update.seconds.values() if value > 0)


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: it is none: not there, not a folder, or full of other things.

    """
    _check(path)
    run = Run(path=path, name=path.resolve().name)
    if not any(found.name != REPORT for found in path.iterdir()):
        run.missing.append("The directory is empty: the run has not begun to write")
        return run
    _read_config(run)
    _read_updates(run)
    run.metrics = list(read_lines(path / "metrics.jsonl", run.missing.append))
    stages = [
        line for line in read_lines(path / "ledger.jsonl", run.missing.append) if line.get("kind") == "stage"
    ]
    if stages:
        run.weights = [
            Weights(line["iteration"], by_source(line.get("weights"), line.get("sources"))) for line in stages
        ]
    lifecycle: list[dict[str, Any]] = []
    if (path / "events.jsonl").exists():
        lifecycle = list(read_lines(path / "events.jsonl", run.missing.append))
    run.events = sorted(
        [*events_of(lifecycle, run.metrics, stages), *run.events], key=lambda event: event.iteration
    )
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
    """The configuration as it stands: a page must not need that this version would accept it."""
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
    """Updates in one pass, of which only those that are drawn keep their heat maps."""
    path = run.path / "mixing.jsonl"
    total = count_lines(path)
    drawn, frames = set(thinned(total, MOST_POINTS)), set(thinned(total, MOST_FRAMES))
    odd = 0
    for place, record in enumerate(read_lines(path, run.missing.append)):
        sources, iteration = record.get("sources"), record["iteration"]
        new = by_source(record.get("new_weights"), sources)
        if not new:
            odd += 1
            continue
        if not run.weights:
            run.weights.append(Weights(0, by_source(record.get("old_weights"), sources)))
        run.weights.append(Weights(iteration, new))
        load = array(record.get("load"), len(new)) if place in drawn | frames else None
        run.updates.append(_update(record, load, new))
        run.events += _events(record)
        if place in frames:
            _add_frames(run, record, load, tuple(new))
    run.load_frames, run.distance_frames = _few(run.load_frames), _few(run.distance_frames)
    if odd:
        run.missing.append(
            f"mixing.jsonl: {odd} records, as of another version, have no weight for each source; left out"
        )


def _update(record: Mapping[str, Any], load: Any, new: Mapping[str, float]) -> Update:
    sources, seconds = record.get("sources"), record.get("seconds")
    return Update(
        iteration=record["iteration"],
        delta=by_source(record.get("delta"), sources),
        delta_error=by_source(record.get("delta_error"), sources),
        epochs=by_source(record.get("epochs"), sources),
        rows=by_source(record.get("rows"), sources),
        seconds=by_source(seconds, None),
        entropy=number(record.get("entropy")),
        kl_step=number(record.get("kl_step")),
        imbalance=_imbalance(load, by_source(record.get("old_weights"), sources)),
    )


def _imbalance(load: Any, weights: Mapping[str, float]) -> tuple[float, ...]:
    """Largest over mean load of the experts in the mix that was drawn, for each layer."""
    if load is None or len(weights) != len(load):
        return ()
    load_DLE = load if load.ndim == 3 else load[:, None]
    mixed_LE = np.tensordot(np.array(list(weights.values())), load_DLE, axes=1)
    mean_L = mixed_LE.mean(axis=-1)
    if not (mean_L > 0).all():
        return ()
    return tuple((mixed_LE.max(axis=-1) / mean_L).tolist())


def _events(record: Mapping[str, Any]) -> list[Event]:
    """What guardrails and the operator did at an update, and what is noted of it."""
    lines = record.get("events")
    lines = lines if isinstance(lines, list) else []
    events = [Event(record["iteration"], *_kind_of_line(str(line))) for line in lines]
    if note := record.get("note"):
        kept = str(note).startswith("weights kept")
        events.append(Event(record["iteration"], "fault" if kept else "note", str(note)))
    return events


def _kind_of_line(line: str) -> tuple[str, str]:
    return ("override", line) if line.startswith("override") else ("guardrail", line)


def _add_frames(run: Run, record: Mapping[str, Any], load: Any, sources: tuple[str, ...]) -> None:
    if load is not None:
        run.load_frames.append(Frame(record["iteration"], sources, flat_load(load)))
        if load.ndim == 3:
            averaged = run.load_frames[-1].values_RC.shape[1] < load[0].size
            how = f"mean of {load.shape[1]} layers" if averaged else f"{load.shape[1]} layers side by side"
            run.load_axis = f"expert ({how})"
    distance_DD = array(record.get("distance"), len(sources))
    if distance_DD is not None and distance_DD.shape == (len(sources), len(sources)):
        run.distance_frames.append(Frame(record["iteration"], sources, distance_DD))


def _few(frames: list[Frame]) -> list[Frame]:
    """As many of the frames as a page can hold."""
    if not frames:
        return []
    most = max(2, MOST_CELLS // frames[-1].values_RC.size)
    return [frames[place] for place in thinned(len(frames), most)]


def end_weights(run: Run) -> Mapping[str, float]:
    """After the last update, by name of the source."""
    return run.weights[-1].shares if run.weights else {}


def end_losses(run: Run) -> Mapping[str, float]:
    """The last that was recorded of each source."""
    found: dict[str, float] = {}
    for record in run.metrics:
        losses = by_source(record.get("source_loss"), None)
        found |= {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    return found
