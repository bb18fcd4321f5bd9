"""The command `prepare`: its flags, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from megatron_dynmix.errors import InputError

SETTINGS = (
    *("tokenizer", "template", "train_on", "probe", "overlong", "seq_length"),
    *("strict", "trust_remote_code", "template_kwargs", "template_date"),
)
"""Arguments that are settings too, where there is a RUN.yaml."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; beside a RUN.yaml every other setting of it is one, too."""
    parser.add_argument("run_yaml", nargs="?", type=Path, metavar="RUN.yaml")
    parser.add_argument("--input", nargs="+", type=Path, metavar="FILE", help="files, patterns or folders")
    parser.add_argument("--output", type=Path, metavar="PREFIX")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder, .model or .tiktoken file, or hf://NAME")
    parser.add_argument("--template", help="tokenizer (default), vicuna, chatml, plain or PATH.jinja")
    parser.add_argument(
        "--train-on", help="all (answers; the default), last, completion, rounds or everything"
    )
    parser.add_argument(
        "--template-kwargs", metavar="{NAME: VALUE}", help="what the chat template is given besides"
    )
    parser.add_argument("--template-date", metavar="YYYY-MM-DD", help="the day that it is told")
    parser.add_argument("--format", help="shape of the rows of --input; found out if not given")
    parser.add_argument(
        "--fields", nargs="+", metavar="OURS=YOURS", help="what keys are called in the rows of --input"
    )
    parser.add_argument(
        "--roles", nargs="+", metavar="YOURS=OURS", help="who is who in the rows of --input: bot=assistant"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the tokenizer's own code")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; by default one for each core")
    parser.add_argument("--strict", action="store_true", help="a row that cannot be used is an error")
    parser.add_argument("--probe", type=int, metavar="N", help="hold N examples out, to PREFIX.probe")
    parser.add_argument("--overlong", help="what is too long: drop (default), truncate, split or error")
    parser.add_argument("--seq-length", type=int, metavar="N", help="positions of a row")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Prepare the sources of a RUN.yaml, or one source from files."""
    try:
        if arguments.run_yaml is None:
            return _prepare_files(arguments, rest)
        if arguments.input or arguments.output:
            raise InputError("give either RUN.yaml or --input and --output, not both")
        for name in ("format", "fields", "roles"):
            if getattr(arguments, name):
                raise InputError(f"--{name} is for --input; in RUN.yaml each source has its own `{name}`")
        return _prepare_run(arguments, rest)
    except KeyboardInterrupt:
        left = "; nothing half-written is left, and sources that were done are not prepared again"
        raise KeyboardInterrupt(left) from None


def _prepare_files(arguments: argparse.Namespace, rest: list[str]) -> int:
    from megatron_dynmix.config.load import parse_flags
    from megatron_dynmix.config.run_config import DataConfig, Overlong, SourceConfig, require
    from megatron_dynmix.data.packed import PackedSource
    from megatron_dynmix.data.prepare.prepare import prepare_source
    from megatron_dynmix.data.prepare.readers import find_inputs, unread_files
    from megatron_dynmix.data.prepare.template import Renderer
    from megatron_dynmix.data.prepared import Recipe, load_report, probe_prefix
    from megatron_dynmix.data.tokenizer.load import load_tokenizer
    from megatron_dynmix.training.data_tables import packed_table, prepared_table

    if rest:
        raise InputError(f"unknown arguments: {' '.join(rest)}")
    missing = [name for name in ("input", "output", "tokenizer") if not getattr(arguments, name)]
    if missing:
        raise InputError(f"--{missing[0]} is missing; give RUN.yaml, or --input, --output and --tokenizer")
    prefix, seq_length, known = arguments.output, arguments.seq_length, get_args(Overlong)
    if arguments.overlong is not None:
        require(arguments.overlong in known, "--overlong", arguments.overlong, f"one of {', '.join(known)}")
        if seq_length is None:
            raise InputError(f"--overlong {arguments.overlong} needs --seq-length, the positions of a row")
    overlong = cast(Overlong, arguments.overlong or "drop")
    require(seq_length is None or seq_length >= 1, "--seq-length", seq_length, "1 or more")
    require(arguments.probe is None or arguments.probe >= 1, "--probe", arguments.probe, "1 or more")
    tokenizer = load_tokenizer(arguments.tokenizer, trust_remote_code=arguments.trust_remote_code)
    data = DataConfig(**parse_flags(_flags(arguments, ("template_kwargs", "template_date"))))
    renderer = Renderer(
        tokenizer,
        arguments.template or "tokenizer",
        arguments.train_on or "all",
        data.template_kwargs,
        data.template_date,
    )
    names = _pairs("--fields", arguments.fields or [], "prompt=question completion=answer")
    roles = _pairs("--roles", arguments.roles or [], "bot=assistant")
    SourceConfig(path="", roles=roles)  # refuses a role that there is not
    report = prepare_source(
        name=prefix.name,
        inputs=[path for given in arguments.input for path in find_inputs(given)],
        prefix=prefix,
        renderer=renderer,
        recipe=Recipe(
            tokenizer=tokenizer.fingerprint,
            template=renderer.fingerprint,
            format=arguments.format or "auto",
            fields=names,
            roles=roles,
            split_length=seq_length if overlong == "split" else None,
            held_out=arguments.probe or 0,
        ),
        unread=[name for given in arguments.input for name in unread_files(given)],
        strict=arguments.strict,
        workers=arguments.workers,
    )
    made = {prefix: report}
    if report.held_out:
        made[probe_prefix(prefix)] = load_report(probe_prefix(prefix))
    print(prepared_table(list(made.values())))
    if seq_length is not None:
        print(f"\nwhat training with --seq-length {seq_length} --overlong {overlong} makes of them:")
        how = {"seq_length": seq_length, "overlong": overlong}
        packed = (
            PackedSource(name=report.name, prefix=prefix, seed=0, cache_dir=None, **how)
            for prefix, report in made.items()
        )
        print(packed_table(list(packed)))
    return 0


def _pairs(flag: str, pairs: Sequence[str], example: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for pair in pairs:
        name, equals, meaning = pair.partition("=")
        if not (name and equals and meaning) or name in names:
            once = "each of our names once, with the name" if flag == "--fields" else "each role"
            raise InputError(f"{flag} has {pair!r}; give {once} in your rows: {flag} {example}")
        names[name] = meaning
    return names


def _flags(arguments: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return as flags of settings what was given of them."""
    flags = []
    for name in names:
        value, flag = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is not None and value is not False:
            flags += [flag] if value is True else [flag, str(value)]
    return flags


def _prepare_run(arguments: argparse.Namespace, rest: list[str]) -> int:
    from megatron_dynmix.config.check.data import check_data, check_tokenizer
    from megatron_dynmix.config.load import load_config
    from megatron_dynmix.data.sources import pack_source, prepare_sources, source_files
    from megatron_dynmix.data.tokenizer.load import load_tokenizer
    from megatron_dynmix.training.data_tables import packed_table, prepared_table, share_table, shared_lines
    from megatron_dynmix.training.mix import initial_shares

    config = load_config(arguments.run_yaml, [*rest, *_flags(arguments, SETTINGS)])
    check_data(config)
    tokenizer = load_tokenizer(config.data.tokenizer or "", trust_remote_code=config.data.trust_remote_code)
    check_tokenizer(config, tokenizer.vocab_size)
    files = list(source_files(config))
    most = config.logging.most_of(config.data.sources)
    print(prepared_table(list(prepare_sources(config, tokenizer, arguments.workers)), most))
    print(*shared_lines(files, config), "", sep="\n")
    train, probe = (
        [pack_source(config, one) for one in files if one.is_probe == wanted] for wanted in (False, True)
    )
    shares = share_table(train, initial_shares(config, train), most)
    print(packed_table([*train, *probe], most), "", shares, sep="\n")
    return 0
