"""The command `plan`: what a run would be on so many ranks, without any of them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the run is planned for."""
    parser.add_argument("run_yaml", type=Path, metavar="RUN.yaml")
    parser.add_argument(
        "--world-size", type=int, required=True, metavar="N", help="ranks: the GPUs of all nodes"
    )
    parser.add_argument("--gpu-memory-gb", type=float, metavar="GB", help="of each GPU; default 80")
    has = "CUDA with Transformer Engine (default with bf16), CUDA without, or a CPU (default in float32)"
    parser.add_argument("--host", choices=["te", "cuda", "cpu"], help=f"what the ranks have: {has}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--trace",
        action="store_true",
        help="run an iteration on fake GPUs: peak memory by line, and every wait for the device",
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print what the run would be; exit 2 if it cannot be, with layouts that can."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.commands.planning import plan_run

    plan_run(arguments, rest, arguments.world_size, as_json=arguments.json, traced=arguments.trace)
    return 0
