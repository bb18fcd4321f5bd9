"""What models are asked in lm-evaluation-harness, and what they scored."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_dynmix.config.load import StrictLoader, read_mapping
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import read_json, write_atomically
from megatron_dynmix.mixing.weights import is_number

SCORES = "scores.json"
"""File of a run that holds scores which other programs have found: {column: number}."""
IMPORTED = "imported"
"""What stands in the place of a column's tasks if its score is in `SCORES`."""
AVERAGE = "average"
COLUMN = "give {tasks: [TASK, ...] or {TASK: METRIC, ...}, shots: NUMBER}, or `imported`"

Metrics = Mapping[str, float]
"""By the harness' names, `metric,filter`."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: the mean over its tasks."""

    name: str
    tasks: Mapping[str, str | None]
    """Task or group of tasks -> its metric; the first that the harness names if None. None for a column
    that is imported."""
    shots: int | None = None
    """Examples in front of each question; as the task has it if None."""


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """What is asked."""

    text: str
    """As `--tasks` has it."""
    columns: tuple[Column, ...]
    include_path: tuple[Path, ...] = ()
    """Folders with task files of one's own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What else the harness' `simple_evaluate` is given."""

    @property
    def flags(self) -> list[str]:
        """Return the flags of `evaluate` that ask the same."""
        folders = [flag for folder in self.include_path for flag in ("--include-path", str(folder))]
        return ["--tasks", self.text, *folders, "--harness", json.dumps(self.arguments)]

    @property
    def by_shots(self) -> dict[int | None, list[str]]:
        """Return the tasks that are asked with the same number of shots."""
        found: dict[int | None, list[str]] = {}
        for column in self.columns:
            for task in column.tasks:
                if task not in found.setdefault(column.shots, []):
                    found[column.shots].append(task)
        return {shots: tasks for shots, tasks in found.items() if tasks}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What `tasks.json` of a run holds: all numbers of every task that was asked."""

    iteration: int
    arguments: Mapping[str, Any]
    results: Mapping[str, Metrics]
    """By `key_of` of a task."""

    @staticmethod
    def path(run_dir: Path) -> Path:
        """Return where a run's answers are."""
        return run_dir / "tasks.json"

    def write(self, run_dir: Path) -> None:
        """Write the run's answers."""
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        write_atomically(self.path(run_dir), text + "\n")

    @classmethod
    def read(cls, run_dir: Path, iteration: int, arguments: Mapping[str, Any]) -> Answers | None:
        """Return the answers of that iteration, asked in the same way; None if there are none."""
        try:
            content = json.loads(cls.path(run_dir).read_text(encoding="utf-8"))
            found = cls(**content)
        except (OSError, ValueError, TypeError):
            return None
        return found if (found.iteration, found.arguments) == (iteration, arguments) else None


def are_known(benchmarks: Benchmarks, answers: Answers | None) -> bool:
    """Tell whether all tasks were asked."""
    known = {} if answers is None else answers.results
    asked = benchmarks.by_shots.items()
    return all(key_of(task, shots) in known for shots, tasks in asked for task in tasks)


def key_of(task: str, shots: int | None) -> str:
    """Return what a task's results are kept under: its name, and its shots where they were given."""
    return task if shots is None else f"{task}, {shots} shots"


def benchmarks_of(tasks: str, include_path: Sequence[Path], harness: str) -> Benchmarks:
    """Read `--tasks`, names with commas between or a YAML file of columns, and what stands beside it.

    Raises:
        InputError: something that cannot be used.

    """
    if tasks.endswith((".yaml", ".yml")):
        columns = _columns_of_file(Path(tasks))
    else:
        names = [name.strip() for name in tasks.split(",")]
        if not all(names):
            raise InputError(f"--tasks is {tasks!r}; give names with commas between, or a file FILE.yaml")
        columns = [Column(name=name, tasks={name: None}) for name in names]
    for folder in include_path:
        if not folder.is_dir():
            raise InputError(f"--include-path {folder}: there is no such folder; give one with task files")
    try:
        arguments = yaml.load(harness, Loader=StrictLoader)
        good = isinstance(arguments, dict) and json.loads(json.dumps(arguments)) == arguments
    except (yaml.YAMLError, TypeError):
        good = False
    if not good:
        raise InputError(f"--harness is {harness!r}; give a mapping, as '{{batch_size: 16, limit: 100}}'")
    if not isinstance(arguments.get("model_args", {}), dict):
        raise InputError("--harness: model_args must be a mapping, as {model_args: {dtype: bfloat16}}")
    return Benchmarks(
        text=tasks, columns=tuple(columns), include_path=tuple(include_path), arguments=arguments
    )


def _columns_of_file(path: Path) -> list[Column]:
    content = read_mapping(path, "columns by name, as `MMLU: {tasks: [mmlu], shots: 5}`")
    return [_column(str(name), given, path) for name, given in content.items()]


def _column(name: str, given: Any, path: Path) -> Column:
    if given == IMPORTED:
        return Column(name=name, tasks={})
    if not isinstance(given, dict) or not given.get("tasks") or set(given) - {"tasks", "shots"}:
        raise InputError(f"{path}: {name} holds {given!r}; {COLUMN}")
    tasks, shots = given["tasks"], given.get("shots")
    if isinstance(tasks, list):
        tasks = dict.fromkeys(tasks)
    texts = isinstance(tasks, dict) and all(
        isinstance(task, str) and (metric is None or isinstance(metric, str))
        for task, metric in tasks.items()
    )
    number = shots is None or (isinstance(shots, int) and not isinstance(shots, bool) and shots >= 0)
    if not texts or not number:
        raise InputError(f"{path}: {name} holds {given!r}; {COLUMN}")
    return Column(name=name, tasks=tasks, shots=shots)


def read_scores(run_dir: Path) -> dict[str, float]:
    """Read what was scored in other programs; nothing where there is no such file."""
    path = run_dir / SCORES
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not all(map(is_number, content.values())):
        raise InputError(f'{path} holds {content!r:.80}; it must hold numbers by name: {{"MBPP": 10.1}}')
    return {str(name): float(score) for name, score in content.items()}


def scores_of(benchmarks: Benchmarks, answers: Answers | None, run_dir: Path) -> dict[str, float]:
    """Return the scores of a run by column, and their average, those of the harness in percent.

    A column of which something is missing is left out, and the average then, too. Scores of `SCORES` that
    no column asks for come last, and are in no average.
    """
    imported = read_scores(run_dir)
    found: dict[str, float] = {}
    for column in benchmarks.columns:
        if not column.tasks:
            found |= {column.name: imported[column.name]} if column.name in imported else {}
        elif answers is not None and are_known(replace(benchmarks, columns=(column,)), answers):
            found[column.name] = 100 * statistics.fmean(
                _metric(answers.results[key_of(task, column.shots)], metric, f"{run_dir}: {task}")
                for task, metric in column.tasks.items()
            )
    if len(found) == len(benchmarks.columns):
        found[AVERAGE] = statistics.fmean(found.values())
    return found | {name: score for name, score in imported.items() if name not in found}


def _metric(metrics: Metrics, wanted: str | None, where: str) -> float:
    """Return a metric by its name, with its filter or, if there is one filter only, without."""
    known = {name: value for name, value in metrics.items() if "_stderr" not in name}
    fitting = [name for name in known if wanted in (None, name, name.partition(",")[0])]
    if not fitting or (wanted is not None and len(fitting) > 1):
        raise InputError(
            f"{where} has no one metric {wanted}; there are {', '.join(known) or 'none'}: name one beside "
            "the task, {TASK: METRIC}"
        )
    value = known[fitting[0]]
    if not 0 <= value <= 1:
        raise InputError(f"{where}: {fitting[0]} is {value}, no share that has a percentage; name another")
    return value
