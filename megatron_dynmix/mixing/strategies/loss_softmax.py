"""Weights straight from the losses.

Axes: D sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.require import loss_of
from megatron_dynmix.mixing.strategies.size import check_temperature
from megatron_dynmix.mixing.strategy import Proposal, Signal
from megatron_dynmix.mixing.update import reweight


@dataclass(frozen=True, kw_only=True)
class LossSoftmax:
    """w = softmax(L / T): the source with the highest loss is drawn most often.

    Nothing is accumulated, so the weights come back as the losses do. Proposed for ms-swift (its pull request
    9142); no published default, 1 leaves a nat of loss worth a factor e.

    Attributes:
        temperature: T > 0 in nats; smaller is sharper.

    Raises:
        ValueError: on construction, for a temperature that is not finite and > 0.

    """

    temperature: float = 1.0

    name: ClassVar[str] = "loss-softmax"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Losses -> weights; the current weights are not read.

        Raises:
            ValueError: a loss is missing.

        """
        loss_D = loss_of(signal, len(weights_D), self.name)
        uniform_D = np.full(len(loss_D), 1 / len(loss_D))
        new_D = reweight(uniform_D, loss_D, eta=1 / self.temperature, smoothing=0)
        return Proposal(weights_D=new_D, delta_D=loss_D)
