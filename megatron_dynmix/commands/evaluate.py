"""The command `evaluate`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dynmix.errors import InputError
from megatron_dynmix.job.rendezvous import world_size_of_job

if TYPE_CHECKING:  # `--help` must not wait for torch
    from megatron_dynmix.compare.benchmarks import Benchmarks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run directory, and the tasks that it may be asked."""
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    add_tasks(parser)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Declare what `tasks_of` reads."""
    parser.add_argument("--tasks", help="of lm-evaluation-harness: a,b or FILE.yaml of columns")
    parser.add_argument(
        "--include-path",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder with task files of your own; may be given several times",
    )
    parser.add_argument(
        "--harness", metavar="YAML", help="more for lm_eval.simple_evaluate: {batch_size: 16, limit: 100}"
    )


def tasks_of(arguments: argparse.Namespace) -> Benchmarks | None:
    """Return what `add_tasks` was given; None without tasks."""
    if arguments.tasks is None:
        if arguments.include_path or arguments.harness is not None:
            raise InputError("--include-path and --harness say how tasks are asked; give --tasks, too")
        return None
    from megatron_dynmix.compare.benchmarks import benchmarks_of

    return benchmarks_of(arguments.tasks, arguments.include_path, arguments.harness or "{}")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Evaluate the newest checkpoint of a run: on the held-out rows of its sources, or on tasks."""
    from megatron_dynmix import platform

    world_size_of_job()
    platform.start()
    from megatron_dynmix.job.launch import end_with_launcher

    end_with_launcher()
    benchmarks = tasks_of(arguments)
    if benchmarks is None:
        _held_out(arguments.run_dir)
    else:
        _ask(arguments.run_dir, benchmarks)
    return 0


def _held_out(run_dir: Path) -> None:
    from megatron_dynmix.records.text_table import table
    from megatron_dynmix.training.evaluate import Evaluation, evaluate

    result = evaluate(run_dir)
    rows = [
        [name, f"{found.loss:.4f}", f"{found.perplexity:.2f}", found.tokens]
        for name, found in result.sources.items()
        if found is not None
    ]
    rows.append(["all tokens", f"{result.token_loss:.4f}", f"{result.perplexity:.2f}", ""])
    print(table(["source", "held-out loss", "perplexity", "tokens"], rows))
    print(
        f"mean over sources {result.mean_loss:.4f}, worst {result.worst_loss:.4f} ({result.worst_source}); "
        f"written to {Evaluation.path(run_dir)}"
    )


def _ask(run_dir: Path, benchmarks: Benchmarks) -> None:
    from megatron_dynmix.compare.benchmarks import Answers, scores_of
    from megatron_dynmix.compare.harness import ask
    from megatron_dynmix.records.text_table import table

    answers = ask(run_dir, benchmarks, lambda text: print(text, flush=True))
    scores = scores_of(benchmarks, answers, run_dir)
    print(table(["task", "score"], [[name, f"{score:.2f}"] for name, score in scores.items()]))
    print(f"in percent, or as imported; all numbers are in {Answers.path(run_dir)}")
