"""One cell of the grid: one variant with one seed, in a run directory of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dynmix.checkpoint.folder import has_checkpoint, newest_good
from megatron_dynmix.checkpoint.run_state import read_run_state
from megatron_dynmix.compare.benchmarks import Answers, are_known, scores_of
from megatron_dynmix.compare.grid import Grid, Variant
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import load_config, to_dict
from megatron_dynmix.data.prepared import SourceReport
from megatron_dynmix.errors import InputError
from megatron_dynmix.training.evaluate import Evaluation
from megatron_dynmix.training.resume import identity


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    grid: Grid
    variant: Variant
    seed: int
    config: RunConfig

    @classmethod
    def of(cls, grid: Grid, variant: Variant, seed: int) -> Cell:
        """Return the cell of a variant and a seed."""
        try:
            config = load_config(grid.run_yaml, [*grid.flags, *variant.flags(seed)])
        except InputError as error:
            raise InputError(f"variant {variant.name}: {error}") from None
        return cls(grid=grid, variant=variant, seed=seed, config=config)

    @property
    def label(self) -> str:
        """What progress lines call it."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def run_dir(self) -> Path:
        """Where its run is."""
        return self.grid.output / self.variant.name / f"seed-{self.seed}"

    @property
    def log(self) -> Path:
        """What its processes say."""
        return self.run_dir / "log.txt"

    def check_run_dir(self) -> None:
        """Refuse a directory that holds a run of another configuration."""
        path = self.run_dir / "config.yaml"
        if not path.is_file():
            return
        try:
            before = _plain(load_config(path))
        except InputError as error:
            raise InputError(f"{self.run_dir}: {error}; remove it, or give another --output") from None
        if changes := list(_changes(before, _plain(self.config))):
            raise InputError(
                f"{self.run_dir} holds a run of another configuration: {'; '.join(changes)}. Give another "
                "--output, or remove it"
            )

    def is_trained(self, reports: Sequence[SourceReport]) -> bool:
        """Tell whether its run is at its last iteration.

        Args:
            reports: of the sources now.

        Raises:
            InputError: the run was on sources of other content.

        """
        directory = self.run_dir / "checkpoints"
        if not has_checkpoint(directory):
            return False
        state = read_run_state(newest_good(directory).source)
        now = identity(self.config, reports)
        if (state.fingerprints, state.probes) != (now.fingerprints, now.probes):
            raise InputError(
                f"{self.run_dir} holds a run on sources of other content, which new ones cannot be compared "
                "with; give another --output, or remove it"
            )
        return state.progress.iteration == self.config.training.train_iters

    def is_evaluated(self) -> bool:
        """Tell whether its last iteration has been evaluated."""
        found = Evaluation.read(self.run_dir)
        return found is not None and found.iteration == self.config.training.train_iters

    def answers(self) -> Answers | None:
        """Return what its last iteration has answered; None if that was not asked, or in another way."""
        total, benchmarks = self.config.training.train_iters, self.grid.benchmarks
        assert total is not None, "checked before start"
        return None if benchmarks is None else Answers.read(self.run_dir, total, benchmarks.arguments)

    @property
    def asks(self) -> bool:
        """Whether it is asked any tasks."""
        benchmarks = self.grid.benchmarks
        return benchmarks is not None and bool(benchmarks.by_shots)

    def is_asked(self) -> bool:
        """Tell whether it has answered all tasks."""
        benchmarks = self.grid.benchmarks
        return benchmarks is None or are_known(benchmarks, self.answers())

    def scores(self) -> dict[str, float]:
        """Return its scores by column, imported ones too; none where no tasks are asked for."""
        benchmarks = self.grid.benchmarks
        return {} if benchmarks is None else scores_of(benchmarks, self.answers(), self.run_dir)

    def train_command(self) -> list[str]:
        """Return the command line that trains it, or resumes its training."""
        return [
            *(sys.executable, "-m", "megatron_dynmix", "train", str(self.grid.run_yaml)),
            *("--run-dir", str(self.run_dir), "--resume", "auto"),
            *(["--nproc-per-node", str(self.grid.nproc)] if self.grid.nproc > 1 else []),
            *self.grid.flags,
            *self.variant.flags(self.seed),
        ]

    def evaluate_command(self) -> list[str]:
        """Return the command line that evaluates it."""
        return [sys.executable, "-m", "megatron_dynmix", "evaluate", str(self.run_dir)]

    def ask_command(self) -> list[str]:
        """Return the command line that asks it the tasks."""
        benchmarks = self.grid.benchmarks
        assert benchmarks is not None, "asked of cells with tasks"
        return [*self.evaluate_command(), *benchmarks.flags]


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as a file has it: no tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(to_dict(config)))
    return plain


def _changes(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the settings that differ, as `section.name: old -> new`."""
    return [
        f"{section}.{name}: {before.get(section, {}).get(name)} -> {settings.get(name)}"
        for section, settings in now.items()
        for name in {**before.get(section, {}), **settings}
        if before.get(section, {}).get(name) != settings.get(name)
    ]
