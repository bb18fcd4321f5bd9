"""The subcommands `compare` and `evaluate`: their arguments, and what they do with them.

Heavy imports wait inside the functions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dynmix.errors import EXIT_FAILED, InputError


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """What `compare` takes beside the flags of `train`."""
    parser.add_argument("run_yaml", type=Path, metavar="RUN.yaml")
    parser.add_argument("--strategies", help="a,b:option=value,option=value")
    parser.add_argument(
        "--grid",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.yaml",
        help="named variants, {name: {setting: value}}; may be given several times",
    )
    parser.add_argument("--seeds", required=True, help="each variant is run with each: 1,2,3")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks of each run")


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """What `evaluate` takes."""
    parser.add_argument("run_dir", type=Path, metavar="RUN")


def run_compare(arguments: argparse.Namespace, flags: list[str]) -> int:
    """Carry out `compare`; returns its exit code."""
    from megatron_dynmix.compare.cell import Plan
    from megatron_dynmix.compare.comparison import compare
    from megatron_dynmix.compare.grid import (
        check_distinct,
        parse_seeds,
        variants_from_file,
        variants_from_text,
    )

    for name in ("jobs", "nproc_per_node"):
        if (value := getattr(arguments, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    variants = [variant for path in arguments.grid for variant in variants_from_file(path)]
    if arguments.strategies is not None:
        variants += variants_from_text(arguments.strategies)
    if not variants:
        raise InputError("nothing to compare; give --strategies a,b,c or --grid FILE.yaml")
    check_distinct(variants)
    plan = Plan(
        run_yaml=arguments.run_yaml,
        output=arguments.output,
        flags=tuple(flags),
        nproc=arguments.nproc_per_node,
    )
    finished = compare(plan, variants, parse_seeds(arguments.seeds), jobs=arguments.jobs, say=_say)
    return 0 if finished else EXIT_FAILED


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Carry out `evaluate`; returns its exit code."""
    from megatron_dynmix.commands.evaluate import EVALUATION, evaluate
    from megatron_dynmix.job.launch import end_with_launcher
    from megatron_dynmix.records.tables import table

    end_with_launcher()
    result = evaluate(arguments.run_dir)
    rows = [
        [name, f"{found['loss']:.4f}", f"{found['perplexity']:.2f}", found["tokens"]]
        for name, found in result["sources"].items()
        if found is not None
    ]
    rows.append(["all tokens", f"{result['token_loss']:.4f}", f"{result['perplexity']:.2f}", ""])
    print(table(["source", "held-out loss", "perplexity", "tokens"], rows))
    print(
        f"mean over sources {result['mean_loss']:.4f}, worst {result['worst_loss']:.4f} "
        f"({result['worst_source']}); written to {arguments.run_dir / EVALUATION}"
    )
    return 0


def _say(text: str) -> None:
    print(text, flush=True)
