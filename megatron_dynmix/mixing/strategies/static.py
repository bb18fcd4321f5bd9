"""Strategies that never change the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.require import numbers_of
from megatron_dynmix.mixing.strategy import Proposal, Signal
from megatron_dynmix.mixing.weights import normalise_weights


@dataclass(frozen=True)
class Fixed:
    """The weights stay as given."""

    name: ClassVar[str] = "fixed"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = False

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the current weights; the signal is not read."""
        return Proposal(weights_D=weights_D.copy(), delta_D=np.zeros(len(weights_D)))


@dataclass(frozen=True)
class Uniform:
    """Every source has weight 1 / D from start to end."""

    name: ClassVar[str] = "uniform"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = False

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the current weights; the signal is not read.

        Raises:
            ValueError: the current weights are not uniform; they would have to be changed without a word.

        """
        if not np.allclose(weights_D, 1 / len(weights_D), rtol=0, atol=1e-9):
            raise ValueError(
                f"uniform mixing was given weights {weights_D.tolist()}; "
                "leave the weights out, or use fixed mixing"
            )
        return Proposal(weights_D=weights_D.copy(), delta_D=np.zeros(len(weights_D)))


@dataclass(frozen=True, kw_only=True)
class FinalStatic:
    """The given weights from start to end, usually those that another run ended with.

    The FinalStatic baseline of Zhu et al. (2025), section 4: whether the path of the weights mattered, or
    only where it ended.

    Attributes:
        weights_D: one number >= 0 per source, in the order of the sources, in any unit.

    Raises:
        ValueError: on construction, for weights that cannot be shares.

    """

    weights_D: Sequence[float]

    name: ClassVar[str] = "final-static"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = True
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._given()

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the given weights; neither the current ones nor the signal is read.

        Raises:
            ValueError: the given weights are for another number of sources.

        """
        given_D = self._given()
        if len(given_D) != len(weights_D):
            raise ValueError(f"final-static has {len(given_D)} weights for {len(weights_D)} sources")
        return Proposal(weights_D=given_D, delta_D=np.zeros(len(given_D)))

    def _given(self) -> NDArray[np.float64]:
        return normalise_weights(numbers_of(self.weights_D, "weight"))
