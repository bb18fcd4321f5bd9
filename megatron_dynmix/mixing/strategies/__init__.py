"""All mixing strategies by name, one file a family, and how a user's own joins them.

A class with a `name` in any file of this folder is a strategy; its dataclass fields are its options.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dynmix.mixing.strategy import Proposal, Signal, Strategy, Wrapped
from megatron_dynmix.mixing.weights import Floats

LISTED_FIRST = ("gate_load", "planned", "losses")
"""Families in the order in which users read of them; others follow by name."""


def _find_strategies() -> dict[str, type[Strategy]]:
    families = sorted(module.name for module in pkgutil.iter_modules(__path__))
    families.sort(key=lambda family: (*LISTED_FIRST, family).index(family))
    found = [
        kind
        for family in families
        for kind in vars(importlib.import_module(f"{__name__}.{family}")).values()
        if isinstance(kind, type) and issubclass(kind, Strategy) and kind.__module__.endswith(f".{family}")
    ]
    return {kind.name: kind for kind in found if "name" in vars(kind)}


STRATEGIES = _find_strategies()


def build_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """Make the strategy of that name with its options; what is not given has its published default.

    A name with a colon is `module:name` of a user's own: a class with the parts of `Strategy`, whose
    constructor's parameters are its options, or a function `(weights_D, signal) -> weights_D`. What is
    refused is said with the nearest name or what is missing.
    """
    if ":" not in name:
        if name not in STRATEGIES:
            raise ValueError(
                f"strategy {name!r} is unknown{_nearest(name, STRATEGIES)}; there are "
                f"{', '.join(STRATEGIES)}, or module:name of your own"
            )
        built_in: Strategy = _construct(name, STRATEGIES[name], options)
        return built_in
    own = _imported(name)
    if isinstance(own, type):
        return _with_all_parts(name, _construct(name, own, options))
    if not callable(own):
        raise ValueError(f"strategy {name} is neither a class nor a function but {own!r}")
    if options:
        raise ValueError(f"strategy {name} is a function and has no options; got {sorted(options)}")
    return FromFunction(name, own)


def _construct(name: str, kind: type[Any], options: Mapping[str, Any]) -> Any:
    signature = inspect.signature(kind)
    parameters = signature.parameters.values()
    known = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option not in known and not takes_any:
            raise ValueError(
                f"strategy {name} has no option {option!r}{_nearest(option, known)}; "
                f"it has {', '.join(known) or 'none'}"
            )
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"strategy {name}: {error}; it has the options {', '.join(known)}") from None
    try:
        return kind(**options)
    except ValueError:
        raise
    except Exception as error:  # a user's own constructor may raise anything
        said = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"strategy {name} cannot be made with the options {dict(options)}: {said}"
        ) from error


def _with_all_parts(name: str, own: Any) -> Strategy:
    """Return a user's own object as a strategy: of the base class, or with the parts of one."""
    missing = [part for part in Wrapped.REQUIRED if not hasattr(own, part)]
    inherited = isinstance(own, Strategy) and type(own).propose is Strategy.propose
    if missing or inherited or not callable(own.propose):
        lacking = ", ".join(missing) or "a propose that can be called"
        raise ValueError(
            f"strategy {name} lacks {lacking}; a strategy has "
            f"{', '.join(Wrapped.REQUIRED)} (see megatron_dynmix.mixing.strategy.Strategy)"
        )
    return own if isinstance(own, Strategy) else Wrapped(own)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # Whatever the user's module does wrong, it is the user who must hear of it, by its name.
        raise ValueError(
            f"strategy {name} cannot be imported: {type(error).__name__}: {error}; give MODULE:NAME of a "
            "class or function that Python finds from here (PYTHONPATH)"
        ) from error


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class FromFunction(Strategy):
    """A user's own rule, given as a function `(weights_D, signal) -> weights_D`."""

    name: str
    rule: Callable[[Floats, Signal], Floats]

    needs_gate_load = True
    needs_loss = True

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose what the function answers; it is checked like any other strategy's proposal."""
        answer = self.rule(weights_D.copy(), signal)
        try:
            new_D = np.asarray(answer, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"strategy {self.name} gave {answer!r}; give one number per source") from None
        return Proposal(weights_D=new_D, delta_D=np.zeros(len(weights_D)))
