"""The command `prepare`: its flags, and what it prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dynmix.errors import EXIT_INTERRUPTED, InputError


def prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; beside a RUN.yaml every other setting of it is one, too."""
    parser.add_argument("run_yaml", nargs="?", type=Path, metavar="RUN.yaml")
    parser.add_argument("--input", nargs="+", type=Path, metavar="FILE", help="files, patterns or folders")
    parser.add_argument("--output", type=Path, metavar="PREFIX")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder, .model or .tiktoken file, or hf://NAME")
    parser.add_argument("--template", help="tokenizer (default), vicuna, chatml, plain or PATH.jinja")
    parser.add_argument("--train-on", help="all (answers; the default), last, completion or everything")
    parser.add_argument("--format", help="shape of the rows of --input; found out if not given")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; by default one for each core")
    parser.add_argument("--strict", action="store_true", help="a row that cannot be used is an error")
    parser.add_argument("--probe", type=int, metavar="N", help="hold N examples out, to PREFIX.probe")
    parser.add_argument("--overlong", help="drop, truncate, split or error")
    parser.add_argument("--seq-length", type=int, metavar="N", help="positions of a row")


def run_prepare(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Prepare the sources of a RUN.yaml, or one source from files; returns the exit code."""
    try:
        if arguments.run_yaml is None:
            return _prepare_files(arguments, rest)
        if arguments.input or arguments.output:
            raise InputError("give either RUN.yaml or --input and --output, not both")
        if arguments.format:
            raise InputError("--format is for --input; in RUN.yaml each source has its own `format`")
        return _prepare_run(arguments, rest)
    except KeyboardInterrupt:
        print(
            "megatron-dynmix: interrupted; nothing half-written is left, and sources that were done are not "
            "prepared again",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _prepare_files(arguments: argparse.Namespace, rest: list[str]) -> int:
    from megatron_dynmix.data.prepare import prepare_source
    from megatron_dynmix.data.readers import find_inputs
    from megatron_dynmix.data.source_report import load_report, probe_prefix
    from megatron_dynmix.data.tokenizer import load_tokenizer
    from megatron_dynmix.training.report import prepared_table

    if rest:
        raise InputError(f"unknown arguments: {' '.join(rest)}")
    missing = [name for name in ("input", "output", "tokenizer") if not getattr(arguments, name)]
    if missing:
        raise InputError(f"--{missing[0]} is missing; give RUN.yaml, or --input, --output and --tokenizer")
    prefix = arguments.output
    report = prepare_source(
        name=prefix.name,
        inputs=[path for given in arguments.input for path in find_inputs(given)],
        prefix=prefix,
        tokenizer=load_tokenizer(arguments.tokenizer),
        template=arguments.template or "tokenizer",
        train_on=arguments.train_on or "all",
        format=arguments.format or "auto",
        split_length=_split_length(arguments.overlong, arguments.seq_length),
        held_out=_count(arguments.probe),
        strict=arguments.strict,
        workers=arguments.workers,
    )
    prefixes = [prefix, *([probe_prefix(prefix)] if report.held_out else [])]
    print(prepared_table([report, *map(load_report, prefixes[1:])]))
    return 0


def _count(probe: int | None) -> int:
    if probe is not None and probe < 1:
        raise InputError(f"--probe is {probe}; it must be 1 or more")
    return probe or 0


def _split_length(overlong: str | None, seq_length: int | None) -> int | None:
    """Positions above which conversations are split; the other rules act when rows are packed."""
    if overlong is None and seq_length is None:
        return None
    if overlong != "split":
        given = f"--overlong {overlong}" if overlong else "--seq-length"
        raise InputError(
            f"{given} acts when rows are packed, not here; give it to train, or beside RUN.yaml; "
            "here there is --overlong split with --seq-length"
        )
    if seq_length is None or seq_length < 1:
        raise InputError("--overlong split needs --seq-length, the positions of a row, 1 or more")
    return seq_length


def _prepare_run(arguments: argparse.Namespace, rest: list[str]) -> int:
    from megatron_dynmix.config.check import check_data, check_tokenizer
    from megatron_dynmix.config.load import load_config
    from megatron_dynmix.data.tokenizer import load_tokenizer
    from megatron_dynmix.training.mix import initial_shares
    from megatron_dynmix.training.report import packed_table, prepared_table, share_table, shared_lines
    from megatron_dynmix.training.sources import build_rows, prepare_sources, source_files

    given = {
        "--tokenizer": arguments.tokenizer,
        "--template": arguments.template,
        "--train-on": arguments.train_on,
        "--probe": arguments.probe,
        "--overlong": arguments.overlong,
        "--seq-length": arguments.seq_length,
    }
    flags = [
        *rest,
        *(text for name, value in given.items() if value is not None for text in (name, str(value))),
        *(["--strict"] if arguments.strict else []),
    ]
    config = load_config(arguments.run_yaml, flags)
    check_data(config)
    tokenizer = load_tokenizer(config.data.tokenizer or "", trust_remote_code=config.data.trust_remote_code)
    check_tokenizer(config, tokenizer.vocab_size)
    print(prepared_table(list(prepare_sources(config, tokenizer, arguments.workers))))
    for line in shared_lines(list(source_files(config)), config):
        print(line)
    print()
    train, probe = (build_rows(config, tokenizer, probe=probe) for probe in (False, True))
    print(packed_table([*train, *probe]))
    print()
    print(share_table(train, initial_shares(config, train)))
    return 0
