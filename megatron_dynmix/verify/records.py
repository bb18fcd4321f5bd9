"""What a run directory says of its mix: the three record files and the newest checkpoint's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dynmix.checkpoint.restore_point import has_checkpoint, newest_good
from megatron_dynmix.checkpoint.run_state import read_run_state
from megatron_dynmix.errors import InputError
from megatron_dynmix.records.jsonl import read_records
from megatron_dynmix.records.ledger import StageLine

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """Everything that `verify` reads."""

    ledger: list[Record]
    mixing: dict[int, Record]
    """By iteration."""
    consumed_samples: dict[int, int]
    """Of `metrics.jsonl`, by iteration."""
    skipped_iterations: int
    state: Record | None
    """Run state of the newest checkpoint."""
    checkpoint: str
    """What to call it."""


def read_run(run_dir: Path) -> RunRecords:
    """Read a run directory; a last line that a kill cut short is left out.

    Raises:
        InputError: it is no run directory, a file is missing, or holds what is no record.

    """
    files = {name: run_dir / f"{name}.jsonl" for name in ("ledger", "mixing", "metrics")}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise InputError(
            f"{run_dir} is no whole run directory: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not in it; give the --run-dir of a run"
        )
    ledger, mixing, metrics = (read_records(path) for path in files.values())
    if not ledger:
        raise InputError(
            f"{files['ledger']} is empty: the run ended before it began, there is nothing to prove"
        )
    state, checkpoint = _newest_state(run_dir / "checkpoints")
    try:
        return RunRecords(
            ledger=list(ledger),
            mixing={record["iteration"]: record for record in mixing},
            consumed_samples={record["iteration"]: record["consumed_samples"] for record in metrics},
            skipped_iterations=sum(record["skipped_iterations"] for record in metrics),
            state=state,
            checkpoint=checkpoint,
        )
    except KeyError as error:
        raise InputError(
            f"{files['metrics']}: a record has no {error}; it was not written by a run"
        ) from None


def _newest_state(directory: Path) -> tuple[Record | None, str]:
    if not has_checkpoint(directory):
        return None, "there is no checkpoint"
    try:
        source = newest_good(directory).source
    except InputError as error:
        return None, f"no checkpoint was compared: {error}"
    return read_run_state(source), source.name


def stage_line(record: Record, where: str) -> StageLine:
    """Read a stage's line.

    Raises:
        InputError: it is not one.

    """
    try:
        line = StageLine.from_json(record)
        sizes = {len(line.weights), len(line.cursor.drawn_D), len(line.cursor.owed_D)}
        sources = line.sources
        sizes |= {len(sources.names), len(sources.sizes), len(sources.fingerprints), len(sources.shuffle_ids)}
        if len(sizes) != 1 or min(sources.sizes) < 1 or line.chunk_size < 1:
            raise ValueError("lists of different lengths, or sources or chunks without rows")
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(f"{where} is no line of a ledger ({type(error).__name__}: {error})") from None
    return line
