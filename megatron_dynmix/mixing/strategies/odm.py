"""Online data mixing: sources are the arms of a bandit, the loss is the reward.

Axes: D sources.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import Proposal, Signal, loss_of

VARIANTS = ("smoothed", "exp3")
EXP3_REWARD_SCALE = 10.0
"""Nats of loss that make a reward of 1 in the authors' EXP3 code."""


@dataclass(frozen=True, kw_only=True)
class OnlineDataMixing:
    """ODM (Albalak et al., 2023): sources with a high loss are drawn more often, all a little.

    At iteration t, with exploration e_t = min(1/D, sqrt(ln D / (D t))), the least weight of any source:

    - ``smoothed``, the class that the authors' README names as the method:
      R_i <- a R_i + (1 - a) exp(L_i), w_i = (1 - D e_t) R_i / sum R + e_t. In proportion to the
      perplexity, without the exponential of a bandit.
    - ``exp3``: R_i <- R_i + (L_i / 10) / w_i for sources with weight,
      w_i = (1 - D e_t) exp(e' R_i) / sum_j exp(e' R_j) + e_t, with e' the exploration of the update
      before, at first 1/D.

    The authors update every step; here rewards are counted once per update, at the mean loss of its interval.
    Until the warm-up is over the weights stay and no reward is counted (published: 2,000 of 100,000 steps).

    Attributes:
        variant: ``smoothed`` or ``exp3``.
        decay: a, from 0 to below 1; used by ``smoothed`` only (published 0.9, also 0.5).
        warmup: share of the run's iterations before the first change, from 0 to 1.

    Raises:
        ValueError: on construction, for an option out of range.

    """

    variant: str = "smoothed"
    decay: float = 0.9
    warmup: float = 0.02

    name: ClassVar[str] = "odm"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is unknown; give one of {VARIANTS}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay {self.decay} must be from 0 to below 1 (published: 0.9)")
        check_warmup(self.warmup)

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Losses -> rewards -> weights. The state holds the rewards and the iteration.

        Rewards of the other variant mean something else: after a change the counting begins anew.

        Raises:
            ValueError: a loss is missing, or the iteration, on which the exploration depends.

        """
        if signal.iteration < 1:
            raise ValueError(
                "odm mixing needs the iterations done, from which its exploration follows; the signal tells "
                "of none"
            )
        loss_D = loss_of(signal, len(weights_D), self.name)
        if signal.iteration < self.warmup * signal.train_iters:
            return Proposal(weights_D=weights_D.copy(), delta_D=np.zeros(len(weights_D)), state=dict(state))
        if state.get("variant") != self.variant:
            state = {}
        before = np.array(state["rewards"]) if state else None
        explored = _exploration(signal.iteration, len(weights_D))
        if self.variant == "smoothed":
            reward_D = self._log_smoothed(loss_D, before)
            score_D = reward_D
        else:
            reward_D = np.zeros(len(loss_D)) if before is None else before
            drawn = weights_D > 0
            reward_D[drawn] += loss_D[drawn] / EXP3_REWARD_SCALE / weights_D[drawn]
            score_D = _exploration(state.get("iteration", 0), len(weights_D)) * reward_D
        alpha_D = np.exp(score_D - score_D.max())
        new_D = (1 - len(weights_D) * explored) * alpha_D / alpha_D.sum() + explored
        return Proposal(
            weights_D=new_D / new_D.sum(),
            delta_D=reward_D,
            state={"variant": self.variant, "iteration": signal.iteration, "rewards": reward_D.tolist()},
        )

    def _log_smoothed(
        self, loss_D: NDArray[np.float64], before: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """The logarithm of R: in R itself a loss above 709 would overflow."""
        gained_D = math.log1p(-self.decay) + loss_D
        if before is None or self.decay == 0:
            return gained_D
        return np.logaddexp(math.log(self.decay) + before, gained_D)


def check_warmup(warmup: float) -> None:
    """Raise ValueError unless ``warmup`` is a share of the run, from 0 to 1."""
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup {warmup} is not a share of the run's iterations; give a number from 0 to 1")


def _exploration(iteration: int, num_sources: int) -> float:
    """The least weight of a source at that iteration."""
    if iteration == 0:
        return 1 / num_sources
    return min(1 / num_sources, math.sqrt(math.log(num_sources) / (num_sources * iteration)))
