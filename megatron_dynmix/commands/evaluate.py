"""The command `evaluate`: its argument, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dynmix.job.rendezvous import world_size_of_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run directory."""
    parser.add_argument("run_dir", type=Path, metavar="RUN")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Evaluate the newest checkpoint of a run on the held-out rows of its sources."""
    from megatron_dynmix import platform

    world_size_of_job()
    platform.start()
    from megatron_dynmix.job.launch import end_with_launcher
    from megatron_dynmix.records.text_table import table
    from megatron_dynmix.training.evaluate import Evaluation, evaluate

    end_with_launcher()
    result = evaluate(arguments.run_dir)
    rows = [
        [name, f"{found.loss:.4f}", f"{found.perplexity:.2f}", found.tokens]
        for name, found in result.sources.items()
        if found is not None
    ]
    rows.append(["all tokens", f"{result.token_loss:.4f}", f"{result.perplexity:.2f}", ""])
    print(table(["source", "held-out loss", "perplexity", "tokens"], rows))
    print(
        f"mean over sources {result.mean_loss:.4f}, worst {result.worst_loss:.4f} ({result.worst_source}); "
        f"written to {Evaluation.path(arguments.run_dir)}"
    )
    return 0
