"""Strategies that give weight to sources whose loss is above a loss given beforehand.

Axes: D sources.

Weights straight from the losses.

Axes: D sources.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategies.fixed import check_temperature
from megatron_dynmix.mixing.strategy import Proposal, Signal, SourceError, loss_of, numbers_of
from megatron_dynmix.mixing.weights import check_step_size, reweight


@dataclass(frozen=True, kw_only=True)
class RefLoss:
    """Excess over a reference model's loss: softmax(log w + eta (L_i - Lref_i)), smoothed by c.

    The RefLoss baseline of Zhu et al. (2025), section 4, with the official settings eta 1 and c 1e-4; the
    reference is the final loss of a run with uniform weights. There the difference may be negative. DoReMi
    (Xie et al., 2023, Algorithm 1) clips it at 0, token by token; ``clip`` does so with the mean per source,
    which is what a run measures.

    Attributes:
        reference_D: mean loss in nats of the reference model on each source, in the order of the sources.
        eta: step size >= 0, per nat.
        smoothing: c, the share spread evenly over the sources, from 0 to 1.
        clip: count a loss below its reference as equal to it.
        max_gap: most nats that a measured loss may be away from its reference; further away, the reference is
            taken for a mistake (one file of the official release holds -100) and refused.

    Raises:
        ValueError: on construction, for a reference that is negative or not finite, or a value out of range.

    """

    reference_D: Sequence[float]
    eta: float = 1.0
    smoothing: float = 1e-4
    clip: bool = False
    max_gap: float = 10.0

    name: ClassVar[str] = "ref-loss"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_options(self.reference_D, "reference loss", self.eta, self.smoothing, self.max_gap)

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Losses -> excess over the reference -> weights.

        Raises:
            ValueError: a loss is missing, or further than ``max_gap`` from its reference.

        """
        return _propose(self, self.reference_D, "reference loss", weights_D, signal)


@dataclass(frozen=True, kw_only=True)
class Sheared:
    """Excess over a target loss: the dynamic batch loading of Sheared LLaMA (Xia et al., 2024, Algorithm 1).

    softmax(log w + eta (L_i - Ltarget_i)), smoothed by c, with the official eta 1 and c 1e-4. The targets
    are the losses that a model of this size should reach, there predicted by a scaling law. The paper
    clips the difference at 0, the official code does not; the default follows the code.

    Attributes:
        target_D: mean loss in nats to be reached on each source, in the order of the sources.
        eta, smoothing, clip, max_gap: as in ``ref-loss``.

    Raises:
        ValueError: on construction, for a target that is negative or not finite, or an option out of range.

    """

    target_D: Sequence[float]
    eta: float = 1.0
    smoothing: float = 1e-4
    clip: bool = False
    max_gap: float = 10.0

    name: ClassVar[str] = "sheared"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_options(self.target_D, "target loss", self.eta, self.smoothing, self.max_gap)

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Losses -> excess over the target -> weights.

        Raises:
            ValueError: a loss is missing, or further than ``max_gap`` from its target.

        """
        return _propose(self, self.target_D, "target loss", weights_D, signal)


def _check_options(given_D: Sequence[float], what: str, eta: float, smoothing: float, max_gap: float) -> None:
    numbers_of(given_D, what, lowest=0)
    check_step_size(eta, smoothing)
    if math.isnan(max_gap) or max_gap <= 0:
        raise ValueError(f"max_gap {max_gap} is no distance in nats; give a number > 0")


def _propose(
    rule: RefLoss | Sheared,
    given_D: Sequence[float],
    what: str,
    weights_D: NDArray[np.float64],
    signal: Signal,
) -> Proposal:
    """The step by how far each loss is above the given one; negative if below, unless clipped."""
    loss_D = loss_of(signal, len(weights_D), rule.name)
    if len(given_D) != len(loss_D):
        raise ValueError(f"{len(given_D)} values of {what} for {len(loss_D)} sources; give one per source")
    delta_D = loss_D - np.asarray(given_D, dtype=np.float64)
    furthest = int(np.argmax(np.abs(delta_D)))
    if abs(delta_D[furthest]) > rule.max_gap:
        raise SourceError(
            [furthest],
            f"is {given_D[furthest]}, its measured loss {loss_D[furthest]:.4g}: more than {rule.max_gap:g} "
            "nats apart; correct it, or raise max_gap",
            before=f"the {what} of ",
        )
    if rule.clip:
        delta_D = np.maximum(delta_D, 0)
    new_D = reweight(weights_D, delta_D, eta=rule.eta, smoothing=rule.smoothing)
    return Proposal(weights_D=new_D, delta_D=delta_D)


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
