"""Where the loop of stock Megatron-LM, 0.16.1 to 0.19, is entered: attributes that it looks up by name.

It has no place of its own to put them: `pretrain(..., callbacks=[...])` of later versions will have one for
steps, but none for checkpoints.
"""

from __future__ import annotations

import inspect
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

AddFlags = Callable[[ArgumentParser], ArgumentParser]


class Entering(Protocol):
    """What is called in the place of stock's functions; each gets that function and its arguments."""

    def train_step(self, stock: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Train one iteration."""

    def skip_step(self, stock: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Draw the samples of an iteration that is not trained (`--iterations-to-skip`)."""

    def save(self, stock: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Write a checkpoint, in which `args` is kept whole."""

    def loaded(self, stock: Callable[..., Any], saved: Any, *given: Any, **named: Any) -> Any:
        """Compare the saved `args` of a checkpoint that the run goes on from."""

    def build(self, stock: Callable[..., Any], builder: Any) -> Any:
        """Build the datasets of all splits."""


@contextmanager
def entered(by: Entering) -> Iterator[None]:
    """Have stock's loop call `by` at five places, and no longer when this is left."""
    import megatron.training.checkpointing as checkpointing
    import megatron.training.training as training
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (training, "train_step", by.train_step),
        (training, "dummy_train_step", by.skip_step),
        (training, "save_checkpoint", by.save),
        (checkpointing, "check_checkpoint_args", by.loaded),
        (BlendedMegatronDatasetBuilder, "build", by.build),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, called in places:
            setattr(owner, name, _in_place_of(getattr(owner, name), called))
        yield
    finally:
        for owner, name, stock in kept:
            setattr(owner, name, stock)


def _in_place_of(stock: Callable[..., Any], called: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: called(stock, *given, **named)  # a plain function: one of them is a method


def wrap_pretrain(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Have every script that imports `pretrain` from `megatron.training` from now on get a wrapped one."""
    import megatron.training as training

    training.pretrain = wrap(training.pretrain)


def takes_configuration(pretrain: Callable[..., Any]) -> bool:
    """Whether flags are parsed before this `pretrain` is called: from 0.18 on it is given what they say."""
    return "cfg_container" in inspect.signature(pretrain).parameters


def parse_with(add_flags: AddFlags) -> None:
    """Have Megatron-LM's parser know more flags, whoever calls it; once is enough for a process."""
    import megatron.training.arguments as arguments

    parse = arguments.parse_args
    if getattr(parse, "adds", None) is add_flags:
        return

    def parse_args(extra_args_provider: AddFlags | None = None, *given: Any, **named: Any) -> Any:
        def add(parser: ArgumentParser) -> ArgumentParser:
            return add_flags(extra_args_provider(parser) if extra_args_provider else parser)

        return parse(add, *given, **named)

    parse_args.adds = add_flags  # type: ignore[attr-defined]
    arguments.parse_args = parse_args
