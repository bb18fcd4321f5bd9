"""Strategies that never change the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .strategy import Proposal, Signal


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
