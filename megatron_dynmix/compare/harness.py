"""A run's model in lm-evaluation-harness, which is there with the extra `evaluate` only."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dynmix import platform
from megatron_dynmix.checkpoint.folder import folder_of
from megatron_dynmix.checkpoint.run_state import read_run_state
from megatron_dynmix.compare.benchmarks import Answers, Benchmarks, key_of
from megatron_dynmix.convert.conversion import checkpoint_of, megatron_to_hf
from megatron_dynmix.errors import CommandFailed, InputError
from megatron_dynmix.job.launch import Lifeline, end_session
from megatron_dynmix.mixing.weights import is_number


def check_benchmarks(benchmarks: Benchmarks) -> None:
    """Refuse, as `InputError`, what cannot be asked: no harness, no such task or argument."""
    _check_installed(benchmarks)
    tasks = [task for some in benchmarks.by_shots.values() for task in some]
    if tasks:
        _asked(None, tasks, None, benchmarks)


def ask(run_dir: Path, benchmarks: Benchmarks, say: Callable[[str], None]) -> Answers:
    """Ask the newest checkpoint of a run what it has not been asked; write `tasks.json`.

    The model is exported to `hugging_face/iter_NNNNNNN` of the run, unless that is there.

    Raises:
        InputError: no checkpoint, what cannot be exported, or what `check_benchmarks` refuses.
        CommandFailed: the harness cannot ask a task.

    """
    _check_installed(benchmarks)
    checkpoint = checkpoint_of(run_dir)
    iteration = read_run_state(checkpoint).progress.iteration
    answers = Answers.read(run_dir, iteration, benchmarks.arguments) or Answers(
        iteration=iteration, arguments=benchmarks.arguments, results={}
    )
    for shots, tasks in benchmarks.by_shots.items():
        missing = [task for task in tasks if key_of(task, shots) not in answers.results]
        if missing:
            model = _exported(run_dir, checkpoint, iteration, say)
            found = _asked(model, missing, shots, benchmarks)
            results = {key_of(task, shots): _numbers(found[task]) for task in missing}
            answers = replace(answers, results={**answers.results, **results})
            answers.write(run_dir)  # what was asked need not be asked again if the next fails
    return answers


def _check_installed(benchmarks: Benchmarks) -> None:
    if benchmarks.by_shots and importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "--tasks needs lm-evaluation-harness, which is not installed: pip install "
            "'megatron-dynmix[evaluate]'"
        )


def _exported(run_dir: Path, checkpoint: Path, iteration: int, say: Callable[[str], None]) -> Path:
    """Return the checkpoint's Hugging Face folder; it has this name when it is whole."""
    folder = folder_of(run_dir / "hugging_face", iteration)
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        megatron_to_hf(
            checkpoint,
            folder,
            dtype=None,
            max_shard_size="5GB",
            fused_experts=None,
            hf_config=None,
            verify=False,
            say=say,
        )
    return folder


def _asked(
    model: Path | None, tasks: Sequence[str], shots: int | None, benchmarks: Benchmarks
) -> dict[str, dict[str, Any]]:
    """Return the metrics of tasks and groups by their names; without a model, only check them."""
    found = answered(
        {
            "model": model and str(model),
            "tasks": list(tasks),
            "shots": shots,
            "include_path": [str(folder) for folder in benchmarks.include_path],
            # of itself the harness takes cuda
            "arguments": {"device": platform.start().device.type, **benchmarks.arguments},
        }
    )
    if "refused" in found:
        raise InputError(found["refused"])
    if "failed" in found:
        raise CommandFailed(f"lm-evaluation-harness cannot ask {', '.join(tasks)}: {found['failed']}")
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def answered(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `asking.answer` says to a request, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "megatron_dynmix.compare.asking", str(asked), str(told)]
        lifeline = Lifeline()
        process = lifeline.start(command, {})
        try:
            code = process.wait()
        finally:
            end_session(process)
            lifeline.close()
        if code == 0:
            answer: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
            return answer
    return {"failed": f"its process ended with exit code {code}"}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what is `metric,filter`; the harness tells the number of questions, too."""
    return {name: float(value) for name, value in metrics.items() if "," in name and is_number(value)}
