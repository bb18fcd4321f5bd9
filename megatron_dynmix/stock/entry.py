"""`mixed(pretrain)`: what stock's entry point is given, wrapped."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_dynmix.errors import EXIT_FAILED, EXIT_REFUSED, InputError, TrainingStopped
from megatron_dynmix.platform.megatron_lm import AddFlags, entered, parse_with, takes_configuration
from megatron_dynmix.stock.flags import add_mixing_flags
from megatron_dynmix.stock.run import StockRun
from megatron_dynmix.training.reweighting import MixingError

NEEDED = ("train_valid_test_dataset_provider", "forward_step_func", "model_provider", "non_loss_data_func")
"""Arguments of `pretrain` that are wrapped."""


def mixed(pretrain: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron-LM's `pretrain`, of any version from 0.16.1 on, with mixing; its signature stays.

    Call it before flags are parsed: from 0.18 on the script parses them itself, and only knows ours from
    then on. InputErrors end the process with 2 and one message.
    """
    takes = inspect.signature(pretrain).parameters
    if missing := [name for name in NEEDED if name not in takes]:
        raise InputError(
            f"mixed() was given {getattr(pretrain, '__name__', pretrain)}, which has no argument "
            f"{', '.join(missing)}; give it megatron.training's pretrain"
        )
    parsed_before = takes_configuration(pretrain)
    if parsed_before:
        parse_with(add_mixing_flags)

    @functools.wraps(pretrain)
    def run(*positional: Any, **named: Any) -> Any:
        with _ending():
            bound = inspect.signature(pretrain).bind(*positional, **named)
            given, run = bound.arguments, StockRun()
            given["train_valid_test_dataset_provider"] = run.datasets(
                given["train_valid_test_dataset_provider"]
            )
            given["forward_step_func"] = run.announced(given["forward_step_func"])
            if given.get("process_non_loss_data_func") is None or given.get("non_loss_data_func") is not None:
                given["non_loss_data_func"] = run.evaluated(given.get("non_loss_data_func"))
            else:
                run.evaluation_is_taken = True
            if parsed_before:
                run.check()
            else:
                given["extra_args_provider"] = with_flags(given.get("extra_args_provider"))
            if given.get("model_provider") is not None:
                given["model_provider"] = run.model(given["model_provider"])
            else:
                given["cfg_container"].model.pre_wrap_hooks.append(run.built)
            with entered(run):
                try:
                    return pretrain(*bound.args, **bound.kwargs)
                finally:
                    run.close()

    return run


def with_flags(extra_args_provider: AddFlags | None = None) -> AddFlags:
    """Return an `extra_args_provider` that adds mixing's flags, for scripts with a parser of their own."""

    def add(parser: ArgumentParser) -> ArgumentParser:
        return add_mixing_flags(extra_args_provider(parser) if extra_args_provider else parser)

    return add


@contextmanager
def _ending() -> Iterator[None]:
    """End the process as our own command does: one message, and 2 for what a user got wrong."""
    try:
        yield
    except InputError as error:
        code, text = EXIT_REFUSED, str(error) if os.environ.get("RANK", "0") == "0" else ""
    except (TrainingStopped, MixingError) as error:
        code, text = EXIT_FAILED, str(error)
    else:
        return
    if text:
        print(f"megatron-dynmix: {text}", file=sys.stderr, flush=True)
    sys.exit(code)
