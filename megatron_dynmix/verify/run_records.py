"""What a run directory says of its mix: the three record files and the newest checkpoint's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dynmix.checkpoint.folder import has_checkpoint, newest_good
from megatron_dynmix.checkpoint.run_state import RunState, read_run_state
from megatron_dynmix.errors import InputError
from megatron_dynmix.records.jsonl import read_lines, read_records
from megatron_dynmix.records.schema import MixingUpdate, SamplesLine, StageLine, TrainingRecord
from megatron_dynmix.records.signals import SIGNALS, with_signal

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """Everything that `verify` reads."""

    ledger: list[Record]
    mixing: dict[int, Record]
    """By iteration."""
    with_arrays: Callable[[MixingUpdate], MixingUpdate]
    """Adds what was measured, see `with_signal`."""
    consumed_samples: dict[int, int]
    """From `metrics.jsonl`, by iteration."""
    skipped_iterations: int
    state: RunState | None
    """Run state of the newest checkpoint."""
    checkpoint: str
    """What to call it."""

    def update(self, iteration: int) -> MixingUpdate | None:
        """Return the update after an iteration, without its arrays; `InputError` if its line is none."""
        try:
            record = self.mixing.get(iteration)
            return None if record is None else MixingUpdate.from_json(record)
        except ValueError as error:
            where = f"mixing.jsonl, iteration {iteration}"
            raise InputError(f"{where} is no record of an update: {error}") from None


def read_run(run_dir: Path) -> RunRecords:
    """Read a run directory; a last line that a kill cut short is left out, other damage an `InputError`."""
    files = {name: run_dir / f"{name}.jsonl" for name in ("ledger", "mixing", "metrics")}
    missing = [path.name for path in files.values() if not path.is_file()]
    mixing = [] if missing else read_records(files["mixing"])
    if any(record.get("block") for record in mixing) and not (run_dir / SIGNALS).is_file():
        missing = [SIGNALS]
    if missing:
        raise InputError(
            f"{run_dir} is no whole run directory: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not in it; give the --run-dir of a run"
        )
    if any("note" in record for record in mixing):
        raise InputError(
            f"{files['mixing']} was written by an earlier version, which kept in it what was measured; use "
            "that version to verify the run"
        )
    ledger, metrics = read_records(files["ledger"]), read_lines(files["metrics"], TrainingRecord)
    if not ledger:
        raise InputError(
            f"{files['ledger']} is empty: the run ended before it began, there is nothing to prove"
        )
    state, checkpoint = _newest_state(run_dir / "checkpoints")
    return RunRecords(
        ledger=list(ledger),
        mixing={record["iteration"]: record for record in mixing},
        with_arrays=partial(with_signal, path=run_dir / SIGNALS),
        consumed_samples={record.iteration: record.consumed_samples for record in metrics},
        skipped_iterations=sum(record.skipped_iterations for record in metrics),
        state=state,
        checkpoint=checkpoint,
    )


def _newest_state(directory: Path) -> tuple[RunState | None, str]:
    if not has_checkpoint(directory):
        return None, "there is no checkpoint"
    try:
        source = newest_good(directory).source
    except InputError as error:
        return None, f"no checkpoint was compared: {error}"
    return read_run_state(source), source.name


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(f"{where} is no line of a ledger ({error})") from None


def stage_line(record: Record, where: str) -> StageLine:
    """Read a stage's line; `InputError` if it is not one."""
    with _refusing(where):
        line = StageLine.from_json(record)
        line.settings  # noqa: B018 - can be read
        sizes = {len(line.weights), len(line.drawn), len(line.owed), len(line.sources), len(line.sizes)}
        if len(sizes | {len(line.fingerprints)}) != 1:
            raise ValueError("lists of different lengths")
        if min(line.sizes) < 1 or line.chunk_size < 1:
            raise ValueError("sources or chunks without rows")
    return line


def samples_line(record: Record, where: str) -> SamplesLine:
    """Read the line of a log interval; `InputError` if it is not one."""
    with _refusing(where):
        line = SamplesLine.from_json(record)
        int(line.digest, 16)
    return line
