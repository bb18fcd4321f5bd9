"""The flags of mixing on Megatron-LM's command line: one for every setting, and those of this way to run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from megatron_dynmix.config.leaves import mixing_leaves
from megatron_dynmix.config.load import add_flags, read_flags
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError

PREFIX = "dynmix"
NO_PROBE = ("probe_tokens", "probe_rows")
"""Settings of held-out rows, which stock's loop has none of."""


def add_mixing_flags(parser: ArgumentParser) -> ArgumentParser:
    """Add all flags of mixing to Megatron-LM's parser and return it."""
    group = parser.add_argument_group("dynamic mixing", "docs/configuration.md explains the settings")
    add_flags(group, mixing_leaves(), PREFIX)
    own = group.add_argument
    own("--dynmix-run-dir", help="folder of the run's records: mixing.jsonl, ledger.jsonl, TensorBoard")
    own("--dynmix-names", nargs="+", help="names of the sources, in the order of --data-path")
    own("--dynmix-max-epochs", nargs="+", metavar="NAME=EPOCHS", help="caps of single sources")
    own(
        "--dynmix-packed-rows",
        action="store_true",
        help="--data-path names sources that `megatron-dynmix prepare` wrote: rows of whole conversations",
    )
    own(
        "--dynmix-padding-mask",
        action="store_true",
        help="leave the padding of packed rows out of the balance loss; stock counts it as tokens",
    )
    own(
        "--dynmix-packed-attention",
        action="store_true",
        help="let middle pipeline stages attend within conversations too; stock gives them no mask",
    )
    own(
        "--dynmix-source-loss",
        action="store_true",
        help="print and record losses by source, of training and of validation",
    )
    parser.set_defaults(dynmix=None)
    return parser


def mixing_of(args: Namespace) -> MixingConfig:
    """Return the settings that the flags give; `InputError` for one that stock's loop cannot follow."""
    if not hasattr(args, "dynmix"):
        raise InputError(
            "mixed(pretrain) was called after the flags were parsed, so none of --dynmix-... was known; put "
            "`pretrain = mixed(pretrain)` below the imports, or parse with "
            "extra_args_provider=with_flags(...)"
        )
    given = read_flags(vars(args), mixing_leaves(), PREFIX)
    if given.get("signal") == "probe" or any(name in given for name in NO_PROBE):
        raise InputError(
            "--dynmix-signal probe and its --dynmix-probe-... need held-out rows, which Megatron-LM's loop "
            "does not have; gate loads are measured while training: leave these flags out"
        )
    return MixingConfig.from_flat(given)


def caps_of(args: Namespace, names: list[str]) -> dict[str, float]:
    """Return the most epochs of the sources that have a cap."""
    caps: dict[str, float] = {}
    for text in args.dynmix_max_epochs or ():
        name, _, number = text.rpartition("=")
        try:
            caps[name] = float(number)
        except ValueError:
            name = ""
        if name not in names or not caps[name] > 0:
            raise InputError(
                f"--dynmix-max-epochs holds {text!r}; give NAME=EPOCHS, EPOCHS above 0, with a NAME of "
                f"{', '.join(names)}"
            )
    return caps


def spelled(flag: str) -> str:
    """Return an attribute of `args` as it is written on a command line."""
    return f"--{flag.replace('_', '-')}"


def value_of(args: Namespace, flag: str) -> Any:
    """Return what a flag was given; None if this version of Megatron-LM has no such flag."""
    return getattr(args, flag, None)
