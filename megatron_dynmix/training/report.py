"""What a run says before it starts: its configuration, what became of the data, what was changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import to_yaml
from megatron_dynmix.data.prepare import SourceReport
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.monitor.tables import table

if TYPE_CHECKING:
    from megatron_dynmix.training.run import Data

NOTABLE_DROP = 0.1
"""Share of a source's examples whose loss deserves a line of its own."""


def report_start(
    config: RunConfig, data: Data, run_dir: Path, changes: Sequence[str], notes: Sequence[str] = ()
) -> None:
    """Print everything a user should see once, on one rank.

    Args:
        config: the resolved configuration.
        data: what the run reads.
        run_dir: where everything is written.
        changes: settings that are not those of the checkpoint.
        notes: what was found wrong with checkpoints that are not used.

    """
    print(f"------------------------ arguments ------------------------\n{to_yaml(config).rstrip()}")
    print("-------------------- end of arguments ---------------------")
    print(prepared_table(data.reports))
    print()
    print(packed_table([*data.train, *data.probe]))
    for note in notes:
        print(note)
    for change in changes:
        print(f"changed since the checkpoint: {change}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    print(f"\ntraining on {ranks}; everything is written to {run_dir}\n", flush=True)


def prepared_table(reports: Sequence[SourceReport]) -> str:
    """What became of each input's examples; the first broken rows by file and line."""
    header = ["source", "examples", "tokens", "trained", "longest", "broken", "untrained", "duplicates"]
    rows = [
        [
            *(report.name, report.examples, report.tokens, report.trained_tokens, report.max_length),
            *(report.broken, report.untrained, report.duplicates),
        ]
        for report in reports
    ]
    broken = [f"  broken: {line}" for report in reports for line in report.first_broken]
    return "\n".join([table(header, rows), *broken])


def packed_table(sources: Sequence[PackedRows]) -> str:
    """What became of each source's examples when they were packed, and a line where many were lost."""
    header = ["source", "rows", "examples", "over-long dropped", "truncated", "untrained", "useful tokens"]
    reports = [(rows.name, rows.packing_report) for rows in sources]
    lines = [
        [
            *(name, report.rows, report.examples, report.dropped_overlong, report.truncated),
            *(report.untrained, f"{report.useful_token_share:.3f}"),
        ]
        for name, report in reports
    ]
    notes = []
    for name, report in reports:
        lost = report.dropped_overlong / (report.examples + report.dropped_overlong + report.untrained)
        if lost > NOTABLE_DROP:
            notes.append(
                f"WARNING: {lost:.0%} of the examples of {name} are longer than seq_length and were dropped; "
                "raise --seq-length, or keep their beginning with --overlong truncate"
            )
    return "\n".join([table(header, lines), *notes])
