"""All mixing strategies by name, and how a user's own joins them."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategies.ado import Ado
from megatron_dynmix.mixing.strategies.balanced import Balanced
from megatron_dynmix.mixing.strategies.fixed import DataSize, FinalStatic, Fixed, Temperature, Uniform, UniMax
from megatron_dynmix.mixing.strategies.gate_load import GateLoad, Inverse, SentenceEmbedding
from megatron_dynmix.mixing.strategies.losses import LossSoftmax, RefLoss, Sheared
from megatron_dynmix.mixing.strategies.odm import OnlineDataMixing
from megatron_dynmix.mixing.strategies.planned import Random, RandomBatch, Schedule, Sequential
from megatron_dynmix.mixing.strategy import Proposal, Signal, Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        *(GateLoad, Inverse, Balanced),
        *(Uniform, Fixed, FinalStatic, DataSize, Temperature, UniMax, SentenceEmbedding),
        *(Schedule, Sequential, Random, RandomBatch),
        *(RefLoss, Sheared, LossSoftmax, OnlineDataMixing, Ado),
    )
}
STRATEGY_PARTS = ("name", "needs_gate_load", "needs_loss", "starts", "updates", "propose")
"""What a strategy must offer, see `Strategy`."""


def build_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """The strategy of that name with its options; what is not given has its published default.

    Args:
        name: a key of `STRATEGIES`, or `module:name` of a user's own: a class with the parts of `Strategy`,
            whose constructor's parameters are its options, or a function `(weights_D, signal) -> weights_D`.
        options: values for the options of the strategy.

    Raises:
        ValueError: an unknown name or option (with the nearest), an option that is missing or out of range,
            or a user's class without all parts of a strategy (they are listed).

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
        raise ValueError(
            f"strategy {name} cannot be made with the options {dict(options)}: {type(error).__name__}: "
            f"{error}"
        ) from error


def _with_all_parts(name: str, strategy: Any) -> Strategy:
    missing = [part for part in STRATEGY_PARTS if not hasattr(strategy, part)]
    if missing or not callable(strategy.propose):
        raise ValueError(
            f"strategy {name} lacks {', '.join(missing) or 'a propose that can be called'}; a strategy has "
            f"{', '.join(STRATEGY_PARTS)} (see megatron_dynmix.mixing.strategy.Strategy)"
        )
    own: Strategy = strategy
    return own


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
class FromFunction:
    """A user's own rule, given as a function `(weights_D, signal) -> weights_D`."""

    name: str
    rule: Callable[[NDArray[np.float64], Signal], NDArray[np.float64]]

    needs_gate_load: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """What the function answers; its answer is checked like any other strategy's.

        Raises:
            ValueError: the function gives no list of numbers.

        """
        answer = self.rule(weights_D.copy(), signal)
        try:
            new_D = np.asarray(answer, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"strategy {self.name} gave {answer!r}; give one number per source") from None
        return Proposal(weights_D=new_D, delta_D=np.zeros(len(weights_D)))
