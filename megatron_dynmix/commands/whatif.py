"""The command `whatif`: its arguments, and what it does with them.

Heavy imports wait inside the functions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dynmix.commands.compare import add_variants
from megatron_dynmix.errors import InputError

PAGE = "whatif.html"
MOST = 20
"""Sources in the table of the terminal; the page has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run, the rules and the page."""
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    add_variants(parser, "rules")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help=f"default RUN/{PAGE}")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Ask other rules about the signals of a run; exit 1 if its own do not give its own weights."""
    from megatron_dynmix import platform

    platform.start()
    from megatron_dynmix.compare.grid import variants_of
    from megatron_dynmix.records.text_table import foremost_rows, table
    from megatron_dynmix.report.pages import write_page
    from megatron_dynmix.verify.run_records import read_run
    from megatron_dynmix.whatif.page import (
        RULES_HEADER,
        page_of_rules,
        remarks_lines,
        rules_rows,
        weights_rows,
    )
    from megatron_dynmix.whatif.rules import Rule, replayed, run_itself

    run_dir: Path = arguments.run_dir
    rules = [Rule.of(variant) for variant in variants_of(arguments.grid, arguments.strategies)]
    records = read_run(run_dir)
    if not records.mixing:
        raise InputError(
            f"{run_dir}: mixing.jsonl holds no weight update, so nothing was measured that another rule "
            "could be asked about; train an interval or more, with --shadow NAME for what the run's own "
            "strategy does not measure"
        )
    own, said = run_itself(records)
    tried = [own, *(replayed(records, rule) for rule in rules)]
    shares = list(own.points[-1].shares.values())
    print(table(RULES_HEADER, rules_rows(tried)))
    print()
    print(foremost_rows(["last weight", *(rule.name for rule in tried)], weights_rows(tried), shares, MOST))
    print()
    print("\n".join([*remarks_lines(tried), said]))
    print(write_page(page_of_rules(run_dir, tried, said), arguments.output or run_dir / PAGE))
    return 0
