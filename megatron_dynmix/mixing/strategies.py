"""All mixing strategies by name, and how a user's own joins them."""

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .gate_load import GateLoad
from .static import Fixed, Uniform
from .strategy import Proposal, Signal, Strategy

STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in (GateLoad, Uniform, Fixed)}


def build_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """The strategy of that name with its options; what is not given has its published default.

    Args:
        name: a key of `STRATEGIES`, or `module:name` of a user's own class or function.
        options: values for fields of the strategy's class.

    Raises:
        ValueError: an unknown name or option (with the nearest), or a value out of range.

    """
    own = _own_strategy(name) if ":" in name else None
    if own is None and name not in STRATEGIES:
        close = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"strategy {name!r} is unknown{hint}; there are {', '.join(STRATEGIES)}")
    kind = own or STRATEGIES[name]
    if not isinstance(kind, type):
        if options:
            raise ValueError(f"strategy {name} is a function and has no options; got {sorted(options)}")
        return FromFunction(name, kind)
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(f"strategy {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    strategy: Strategy = kind(**options)
    return strategy


def _own_strategy(name: str) -> Callable[..., Any] | type[Strategy]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"strategy {name} cannot be imported: {error}; give MODULE:NAME of a class or function that "
            "Python finds from here (PYTHONPATH)"
        ) from None


@dataclass(frozen=True)
class FromFunction:
    """A user's own rule, given as a function `(weights_D, signal) -> weights_D`."""

    name: str
    rule: Callable[[NDArray[np.float64], Signal], NDArray[np.float64]]

    needs_gate_load: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """What the function answers; its answer is checked like any other strategy's."""
        new_D = np.asarray(self.rule(weights_D.copy(), signal), dtype=np.float64)
        return Proposal(weights_D=new_D, delta_D=np.zeros(len(weights_D)))
