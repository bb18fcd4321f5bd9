"""The command `similarity`: its arguments, and what it does with them.

Heavy imports wait inside the functions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.job.rendezvous import is_rank, world_size_for

TOKENS = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the model, the sources and the sample."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder, or a run directory")
    parser.add_argument(
        "sources", nargs="*", metavar="NAME=PATH", help="two sources or more; default: those of the run"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the page is written")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"positions read of each, default {TOKENS}"
    )
    parser.add_argument("--nproc-per-node", type=int, help="start this many ranks here")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Tell which sources are redundant, by how the experts of a model are loaded."""
    if arguments.tokens < 1:
        raise InputError(f"--tokens is {arguments.tokens}; it must be 1 or more")
    world_size = world_size_for(arguments.nproc_per_node)
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.config.check import check_run
    from megatron_dynmix.config.load import load_config
    from megatron_dynmix.job.launch import end_with_launcher, launch_ranks
    from megatron_dynmix.similarity.measure import measure, set_up, source_paths, write_run_yaml

    end_with_launcher()
    model: Path = arguments.model
    sources = source_paths(arguments.sources)
    config = load_config(write_run_yaml(model, sources, arguments.output, world_size), rest)
    check_run(config, world_size)
    checked = set_up(config, model)
    if world_size > 1 and not is_rank():
        given = [f"{name}={path}" for name, path in sources.items()]
        command = [sys.executable, "-m", "megatron_dynmix", "similarity", str(model), *given]
        command += ["--output", str(arguments.output), "--tokens", str(arguments.tokens), *rest]
        return launch_ranks(command, world_size)
    measured = measure(checked, model, arguments.tokens)
    import torch

    if torch.distributed.get_rank() == 0:
        _tell(arguments, list(config.data.sources), measured)
    return 0


def _tell(arguments: argparse.Namespace, sources: list[str], measured: Any) -> None:
    """Print what was found, and write the page and the JSON."""
    from megatron_dynmix.files import write_atomically
    from megatron_dynmix.records.text_table import table
    from megatron_dynmix.report.pages import write_page
    from megatron_dynmix.similarity.findings import findings
    from megatron_dynmix.similarity.page import page_of_sources, sentences, sources_table

    try:
        found = findings(sources, measured.half_counts_HDLE, measured.size_D)
    except ValueError as error:
        raise InputError(f"{error}; give sources with more rows, or a higher --tokens") from None
    listed = sources_table(found, measured)
    print(table(listed.header, listed.rows))
    print("\n".join(sentences(found)))
    numbers = found.to_json() | {"tokens": measured.tokens_D, "losses": measured.losses}
    path = arguments.output / "similarity.json"
    write_atomically(path, json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    for rule, weights in found.weights.items():
        text = json.dumps(dict(zip(sources, weights, strict=True)), indent=1)
        write_atomically(arguments.output / f"weights-{rule}.json", text + "\n")
    print(f"written: {path}, and weights-RULE.json beside it, for weights_from")
    print(write_page(page_of_sources(arguments.model, found, measured), arguments.output / "similarity.html"))
