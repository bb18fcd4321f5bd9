"""The command `convert`: its flags, and its verdict as text."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dynmix.convert.aside import aside_text
from megatron_dynmix.convert.staging import partial_of
from megatron_dynmix.errors import EXIT_FAILED, InputError
from megatron_dynmix.records.text_table import table

if TYPE_CHECKING:  # `--help` must not wait for torch
    from megatron_dynmix.convert.verdict import GroupVerdict, Verdict

TYPES = {"keep": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SUM_DIGITS = 16
"""Digits of a checksum that are shown."""
SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two directions and their flags."""
    ways = parser.add_subparsers(required=True, metavar="DIRECTION", dest="direction")
    inwards = ways.add_parser(
        "hf-to-megatron",
        help="safetensors of a Hugging Face folder -> a checkpoint to start runs from, on any layout",
        allow_abbrev=False,
    )
    outwards = ways.add_parser(
        "megatron-to-hf",
        help="a run, or one of its checkpoints -> a Hugging Face folder",
        allow_abbrev=False,
    )
    inwards.add_argument("source", type=Path, metavar="SRC", help="folder with config.json and safetensors")
    outwards.add_argument(
        "source", type=Path, metavar="SRC", help="run, checkpoints folder, iter_* folder or converted folder"
    )
    inwards.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="pads the embedding (128)"
    )
    outwards.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (5GB)")
    outwards.add_argument(
        "--experts", choices=["per-expert", "fused"], help="tensors of a layer's experts; as they came"
    )
    outwards.add_argument(
        "--hf-config", type=Path, metavar="DIR", help="folder with the model's config.json; found out"
    )
    for way in (inwards, outwards):
        way.add_argument("destination", type=Path, metavar="DST", help="new folder")
        way.add_argument("--dtype", choices=[*TYPES], default="keep", help="type of the weights")
        way.add_argument(
            "--no-verify", dest="verify", action="store_false", help="leave out the comparison afterwards"
        )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Convert one way or the other; return the exit code: 1 if what was written is not what was read."""
    try:
        verdict = _convert(arguments)
    except KeyboardInterrupt:
        partial = partial_of(arguments.destination)
        left = (
            f"what is done lies in {partial}, and the same command resumes from there"
            if partial.is_dir()
            else "nothing is half done"
        )
        raise KeyboardInterrupt(f"; {left}") from None
    print(verdict_text(verdict))
    return 0 if verdict.passed else EXIT_FAILED


def _convert(arguments: argparse.Namespace) -> Verdict:
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.convert.conversion import hf_to_megatron, megatron_to_hf

    source, destination = arguments.source, arguments.destination
    if destination.absolute() == source.absolute():
        raise InputError(f"SRC and DST are both {source}; give DST another name")
    say = functools.partial(print, file=sys.stderr, flush=True)
    common = {"dtype": TYPES[arguments.dtype], "verify": arguments.verify, "say": say}
    if arguments.direction == "hf-to-megatron":
        vocab_multiple = arguments.make_vocab_size_divisible_by
        return hf_to_megatron(source, destination, vocab_multiple=vocab_multiple, **common)
    return megatron_to_hf(
        source,
        destination,
        max_shard_size=arguments.max_shard_size,
        fused_experts=None if arguments.experts is None else arguments.experts == "fused",
        hf_config=arguments.hf_config,
        **common,
    )


def verdict_text(verdict: Verdict) -> str:
    """Return the tables, and one line that says whether what was written is what was read."""
    counts = [
        ["read", verdict.read],
        ["written", verdict.written],
        ["unused", 0],  # a conversion that leaves a tensor out, or has none for a place, does not begin
        ["missing", 0],
        ["computed, left out", len(verdict.computed)],
    ]
    if verdict.aside:
        counts.append(["kept aside", len(verdict.aside)])
    lines = [table(["tensors", "count"], counts), "", f"vocabulary padding: {verdict.padding}", ""]
    if verdict.groups is None:
        lines.append("values and logits: not compared (--no-verify)")
    else:
        lines.append(_values_table(verdict.groups))
        differing = [name for group in verdict.groups for name in group.differing]
        if differing:
            more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
            lines += ["", f"values differ in {', '.join(differing[:SHOWN])}{more}"]
        lines += ["", *([verdict.logits.describe()] if verdict.logits is not None else [])]
    if verdict.aside:
        lines.append(f"kept aside: {aside_text(verdict.aside)}")
    lines += [f"note: {note}" for note in verdict.notes]
    if not verdict.passed:
        lines.append(f"NOT CONVERTED: the comparison failed; what was written is left in {verdict.folder}")
    elif verdict.groups is None:
        lines.append(f"CONVERTED, NOT VERIFIED: {verdict.folder} ({verdict.dtype})")
    else:
        rounded = ", rounded" if any(group.rounded for group in verdict.groups) else ""
        lines.append(
            f"CONVERTED: {verdict.folder} ({verdict.dtype}) holds every value that was read{rounded}"
        )
    return "\n".join(lines)


def _values_table(groups: list[GroupVerdict]) -> str:
    header = ["values of", "tensors", "numbers", "GB", "checksum read", "checksum written", "equal"]
    cast = any(group.rounded for group in groups)
    header += ["rounded off"] if cast else []
    rows = [
        [
            *(group.group, group.tensors, f"{group.numbers:,}", f"{group.nbytes / 1e9:.3f}"),
            *(group.read_sum[:SUM_DIGITS], group.written_sum[:SUM_DIGITS]),
            "NO" if group.differing else "yes",
            *([f"{group.rounded:.1e}"] if cast else []),
        ]
        for group in groups
    ]
    return table(header, rows)
