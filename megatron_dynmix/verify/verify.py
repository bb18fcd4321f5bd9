"""Whether a run drew what its weights call for, and whether its weights follow from what was measured.

Everything is drawn again from the ledger's stages, from sample 0 on, and compared line by line. The first
thing that does not agree ends the proof. Axes: D sources, E experts.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dynmix.checkpoint.run_state import RunState
from megatron_dynmix.data.blend import Cursor, Stage
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.weights import check_weights
from megatron_dynmix.records.ledger import cursor_of
from megatron_dynmix.records.schema import MixingUpdate, StageLine
from megatron_dynmix.training.source_change import SourceChange
from megatron_dynmix.verify.replay import Replay
from megatron_dynmix.verify.rule import RuleReplay
from megatron_dynmix.verify.run_records import Record, RunRecords, read_run, samples_line, stage_line
from megatron_dynmix.verify.verdict import TOLERANCE, NotProven, Verdict


def verify(run_dir: Path) -> Verdict:
    """Prove a run from its directory alone; `InputError` if it is none, or its files are incomplete."""
    return verify_records(read_run(run_dir))


def verify_records(records: RunRecords) -> Verdict:
    """Prove a run from its records; `InputError` for a line of the ledger that no run wrote."""
    proof = _Proof(records)
    try:
        proof.run()
    except NotProven as failure:
        proof.verdict.failure = str(failure)
    proof.finish()
    return proof.verdict


class _Proof:
    """One pass over the ledger with the replay beside it."""

    def __init__(self, records: RunRecords) -> None:
        self.records = records
        self.verdict = Verdict()
        self.stages: list[StageLine] = []
        self.replay: Replay | None = None
        self._updates = sorted(records.mixing)
        self._checkpoint_done = False
        if records.state is None:
            self.verdict.notes.append(records.checkpoint)

    def run(self) -> None:
        ledger, notes = self.records.ledger, self.verdict.notes
        for before, after in pairwise(ledger):
            if after["iteration"] < before["iteration"]:
                raise NotProven(
                    f"ledger.jsonl: iteration {after['iteration']} comes after {before['iteration']}: lines "
                    "were exchanged"
                )
        for number, record in enumerate(ledger, start=1):
            where, iteration = f"ledger.jsonl:{number}", record["iteration"]
            self._check_checkpoint(before=iteration)
            self._refuse_unmatched_updates(before=iteration)
            if number == 1:
                self._begin(record, where)
            elif record.get("kind") == "samples":
                self._check_samples(record, where)
            else:
                self._check_stage(stage_line(record, where), where, is_last=number == len(ledger))
        self._check_checkpoint(before=None)
        self._refuse_unmatched_updates(before=ledger[-1]["iteration"] + 1)
        if self._updates:
            notes.append(f"mixing.jsonl continues to iteration {self._updates[-1]}, the ledger does not")
        if self.records.skipped_iterations:
            notes.append(
                f"{self.records.skipped_iterations} iterations changed no parameter (skipped_iterations in "
                "metrics.jsonl); their rows count as drawn"
            )
        last_sample = max(self.records.consumed_samples.values(), default=0)
        if last_sample > self.verdict.samples:
            notes.append(f"metrics.jsonl continues to sample {last_sample}, the ledger does not")

    def finish(self) -> None:
        """Fill in what was drawn, as far as the replay came."""
        if self.replay is None:
            return
        cursor = self.replay.cursor
        self.replay.settle()
        self.verdict.tallies = [*self.replay.retired, *self.replay.tallies]
        self.verdict.worst_stray = self.replay.worst_stray
        self.verdict.worst_owed = float(np.abs(cursor.owed_D).max())
        bad = [tally.name for tally in self.verdict.tallies if tally.lost or tally.repeated]
        if bad and self.verdict.proven:
            self.verdict.failure = f"rows of {', '.join(bad)} were lost or repeated within an epoch"

    def _begin(self, record: Record, where: str) -> None:
        line = stage_line(record, where) if record.get("why") == "start" else None
        if line is None or line.start_sample or any(line.drawn) or any(line.owed):
            raise NotProven(f"{where} is not the start of a run: a line is missing or was changed")
        _check_shares(line, where)
        self.stages.append(line)
        self.replay = Replay(line)
        self._rule = RuleReplay(line, where, self.verdict.notes)

    def _check_samples(self, record: Record, where: str) -> None:
        """Refuse a digest of what was trained on that is not that of what the stages call for."""
        assert self.replay is not None
        verdict, line = self.verdict, samples_line(record, where)
        iteration, first, consumed = line.iteration, line.first_sample, line.consumed_samples
        digest = int(line.digest, 16)
        if first != verdict.samples:
            raise NotProven(
                f"{where} goes on from sample {first}, but the lines before end at {verdict.samples}: one is "
                "missing or was changed"
            )
        if (
            consumed != self.records.consumed_samples.get(iteration, consumed)
            or consumed < self.replay.sample
        ):
            raise NotProven(
                f"{where} says {consumed} samples were consumed after iteration {iteration}; metrics.jsonl "
                "or the stages before say another number"
            )
        self.replay.go_to(consumed)
        if self.replay.digest != digest:
            raise NotProven(
                f"{where}: the samples {first} to {consumed - 1} that were trained on are not those that the "
                f"stages call for (digest {digest:016x}, replayed {self.replay.digest:016x})"
            )
        self.replay.digest = 0
        verdict.samples, verdict.iteration = consumed, iteration

    def _check_stage(self, line: StageLine, where: str, *, is_last: bool) -> None:
        assert self.replay is not None
        last = self.stages[-1]
        start = line.start_sample
        if start < self.replay.sample:
            raise NotProven(
                f"{where} begins at sample {start}, before what was drawn already: stages were exchanged or "
                "changed"
            )
        if (line.seed, line.chunk_size) != (last.seed, last.chunk_size):
            raise NotProven(f"{where} has another seed or chunk size than the stages before")
        _check_shares(line, where)
        if line.why == "update":
            self._check_update(line, last, where, is_last=is_last)
        elif line.why == "sources changed":
            if start != self._expected_sample(line.iteration - 1, start):
                raise NotProven(f"{where} begins at sample {start}, which is not where the run was resumed")
            self.replay.go_to(start)
            self._change_sources(line, last, where)
        else:
            raise NotProven(f"{where} says why it began with {line.why!r}, which only the first line may")
        self.stages.append(line)

    def _expected_sample(self, iteration: int, default: int) -> int:
        return self.records.consumed_samples.get(iteration, default)

    def _check_update(self, line: StageLine, last: StageLine, where: str, *, is_last: bool) -> None:
        assert self.replay is not None
        iteration, start = line.iteration, line.start_sample
        if line.source_set != last.source_set:
            raise NotProven(f"{where} has other sources than the stage before")
        update = self._update(iteration)
        if update is None:
            if not is_last or any(update > iteration for update in self._updates):
                raise NotProven(f"{where}: mixing.jsonl has no update after iteration {iteration}")
            self.verdict.notes.append(
                f"the update after iteration {iteration} is not in mixing.jsonl: not proven"
            )
        elif update.consumed_samples != start or start != self._expected_sample(iteration, start):
            raise NotProven(
                f"{where} begins at sample {start}; mixing.jsonl or metrics.jsonl say another one for "
                f"iteration {iteration}"
            )
        self.replay.go_to(start)
        self._check_cursor(cursor_of(line), self.replay.cursor, where)
        if update is not None:
            self._updates.remove(iteration)
            _check_update(update, line, last, self.replay.cursor)
            try:
                update = self.records.with_arrays(update)
            except InputError as error:
                raise NotProven(f"the update cannot be made again: {error}") from None
            if self._rule.check(update, line, last):
                self.verdict.updates += 1
        self.replay.begin_stage(line)

    def _update(self, iteration: int) -> MixingUpdate | None:
        try:
            return self.records.update(iteration)
        except InputError as error:
            raise NotProven(str(error)) from None

    def _change_sources(self, line: StageLine, last: StageLine, where: str) -> None:
        assert self.replay is not None
        change = SourceChange.between(last.source_set, line.source_set)
        cursor = change.cursor(self.replay.cursor)
        self._check_cursor(cursor_of(line), cursor, where)
        weights_D = np.array(line.weights)
        if np.abs(change.weights_D(last.weights, weights_D) - weights_D).max() > TOLERANCE:
            raise NotProven(f"{where}: sources that stayed did not keep the proportion of their weights")
        self._rule.change_sources(change, line)
        self.replay.change_sources(line, cursor, change.kept_D)
        self.verdict.notes.append(f"the sources changed at sample {cursor.sample}: {'; '.join(line.changes)}")

    def _check_cursor(self, recorded: Cursor, replayed: Cursor, where: str) -> None:
        for what in ("drawn_D", "owed_D"):
            mine, theirs = getattr(replayed, what), getattr(recorded, what)
            if not np.array_equal(mine, theirs):
                raise NotProven(
                    f"{where}: rows {what.removesuffix('_D')} of the sources at sample {recorded.sample} are "
                    f"{theirs.tolist()}, replayed {mine.tolist()}"
                )

    def _refuse_unmatched_updates(self, *, before: int) -> None:
        for iteration in self._updates:
            if iteration < before and iteration <= self.records.ledger[-1]["iteration"]:
                raise NotProven(
                    f"mixing.jsonl has an update after iteration {iteration}, the ledger has no stage"
                )

    def _check_checkpoint(self, *, before: int | None) -> None:
        """Refuse a newest checkpoint that does not stand where the replay stands after its iteration."""
        state = self.records.state
        if self._checkpoint_done or state is None:
            return
        iteration, consumed = state.progress.iteration, state.progress.consumed_samples
        if before is not None and iteration >= before:
            return
        self._checkpoint_done = True
        if self.replay is None:
            return
        self._compare_state(state, self.records.checkpoint)
        if before is None:  # it stands beyond the ledger: the digest it holds has proven the rest
            self.verdict.samples, self.verdict.iteration = consumed, iteration

    def _compare_state(self, state: RunState, where: str) -> None:
        assert self.replay is not None
        blend, consumed, drawn = state.mix.blend, state.progress.consumed_samples, state.drawn
        stages = tuple(Stage(line.start_sample, tuple(line.weights)) for line in self.stages)
        if blend.stages != stages:
            count = len(blend.stages)
            what = f"it has {count}, the ledger {len(stages)}" if count != len(stages) else "they differ"
            raise NotProven(f"{where}: its stages are not those of the ledger: {what}")
        if drawn.first_sample != self.verdict.samples or consumed < self.replay.sample:
            raise NotProven(
                f"{where} stands at sample {consumed} and knows a ledger up to {drawn.first_sample}, but "
                f"it ends at {self.verdict.samples}: lines are missing"
            )
        self.replay.go_to(consumed)
        self._check_cursor(blend.cursor_at(consumed), self.replay.cursor, where)
        if drawn.digest != self.replay.digest:
            raise NotProven(
                f"{where}: the samples {drawn.first_sample} to {consumed - 1} that were trained on are "
                "not those that the stages call for"
            )


def _check_shares(line: StageLine, where: str) -> None:
    try:
        check_weights(line.weights, len(line.weights))
    except ValueError as error:
        raise NotProven(f"{where}: {error}") from None


def _check_update(update: MixingUpdate, line: StageLine, last: StageLine, cursor: Cursor) -> None:
    """Refuse an update that does not agree with its stage and with what was drawn before it."""
    expected: dict[str, list[Any]] = {
        "sources": line.sources,
        "old_weights": last.weights,
        "new_weights": line.weights,
        "rows": cursor.drawn_D.tolist(),
        "epochs": (cursor.drawn_D / np.array(line.sizes)).tolist(),
    }
    for name, value in expected.items():
        if (recorded := getattr(update, name)) != value:
            raise NotProven(
                f"mixing.jsonl, iteration {line.iteration}: {name} is {recorded}; the ledger and its replay "
                f"say {value}"
            )
