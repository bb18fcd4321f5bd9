"""Strategies on the losses of D sources: excess over a given one, the loss itself, the reward of a bandit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dynmix.mixing.strategy import Proposal, Signal, SourceError, Strategy, loss_of, numbers_of
from megatron_dynmix.mixing.weights import Floats, check_step_size, reweight


@dataclass(frozen=True, kw_only=True)
class ExcessLoss(Strategy):
    """Excess over a loss given for each source: softmax(log w + eta (L_i - Lgiven_i)), smoothed by c.

    Attributes:
        eta: step size >= 0, per nat.
        smoothing: c, the share spread evenly over the sources, from 0 to 1.
        clip: count a loss below its reference as equal to it.
        max_gap: most nats that a measured loss may be away from its reference; further away, the reference is
            taken for a mistake (one file of the official release holds -100) and refused.

    """

    eta: float = 1.0
    smoothing: float = 1e-4
    clip: bool = False
    max_gap: float = 10.0

    needs_loss = True
    given = given_in = ""
    """What the given losses are called, and the option that holds one of them per source."""

    def __post_init__(self) -> None:
        numbers_of(getattr(self, self.given_in), self.given, lowest=0)
        check_step_size(self.eta, self.smoothing)
        if math.isnan(self.max_gap) or self.max_gap <= 0:
            raise ValueError(f"max_gap {self.max_gap} is no distance in nats; give a number > 0")

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Step by how far each loss is above the given one; down if below, unless clipped."""
        loss_D = loss_of(signal, len(weights_D), self.name)
        given_D = getattr(self, self.given_in)
        if len(given_D) != len(loss_D):
            raise ValueError(
                f"{len(given_D)} values of {self.given} for {len(loss_D)} sources; give one per source"
            )
        delta_D = loss_D - np.asarray(given_D, dtype=np.float64)
        furthest = int(np.argmax(np.abs(delta_D)))
        if abs(delta_D[furthest]) > self.max_gap:
            raise SourceError(
                [furthest],
                f"is {given_D[furthest]}, its measured loss {loss_D[furthest]:.4g}: more than "
                f"{self.max_gap:g} nats apart; correct it, or raise max_gap",
                before=f"the {self.given} of ",
            )
        if self.clip:
            delta_D = np.maximum(delta_D, 0)
        new_D = reweight(weights_D, delta_D, eta=self.eta, smoothing=self.smoothing)
        return Proposal(weights_D=new_D, delta_D=delta_D)


@dataclass(frozen=True, kw_only=True)
class RefLoss(ExcessLoss):
    """Excess over a reference model's loss: softmax(log w + eta (L_i - Lref_i)), smoothed by c.

    The RefLoss baseline of Zhu et al. (2025), section 4, with the official settings eta 1 and c 1e-4; the
    reference is the final mean loss, in nats, of a run with uniform weights. There the difference may be
    negative. DoReMi (Xie et al., 2023, Algorithm 1) clips it at 0, token by token; ``clip`` does so with the
    mean per source, which is what a run measures.
    """

    reference_D: Sequence[float]

    name = "ref-loss"
    given, given_in = "reference loss", "reference_D"


@dataclass(frozen=True, kw_only=True)
class Sheared(ExcessLoss):
    """Excess over a target loss: the dynamic batch loading of Sheared LLaMA (Xia et al., 2024, Algorithm 1).

    The official code's eta 1 and c 1e-4. The targets are the losses in nats that a model of this size should
    reach, there predicted by a scaling law. The paper clips the difference at 0, the official code does not;
    the default follows the code.
    """

    target_D: Sequence[float]

    name = "sheared"
    given, given_in = "target loss", "target_D"


@dataclass(frozen=True, kw_only=True)
class LossSoftmax(Strategy):
    """w = softmax(L / T): the source with the highest loss is drawn most often.

    Nothing is accumulated, so the weights come back as the losses do. Proposed for ms-swift (its pull request
    9142); no published default, 1 leaves a nat of loss worth a factor e.

    Attributes:
        temperature: T > 0 in nats; smaller is sharper.

    """

    temperature: float = 1.0

    name = "loss-softmax"
    needs_loss = True

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Turn losses into weights; the current weights are not read."""
        loss_D = loss_of(signal, len(weights_D), self.name)
        uniform_D = np.full(len(loss_D), 1 / len(loss_D))
        new_D = reweight(uniform_D, loss_D, eta=1 / self.temperature, smoothing=0)
        return Proposal(weights_D=new_D, delta_D=loss_D)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is finite and > 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature} is unusable; give a finite number > 0")


VARIANTS = ("smoothed", "exp3")
EXP3_REWARD_SCALE = 10.0
"""Nats of loss that make a reward of 1 in the authors' EXP3 code."""


@dataclass(frozen=True, kw_only=True)
class OnlineDataMixing(Strategy):
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

    """

    variant: str = "smoothed"
    decay: float = 0.9
    warmup: float = 0.02

    name = "odm"
    needs_loss = True

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is unknown; give one of {VARIANTS}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay {self.decay} must be from 0 to below 1 (published: 0.9)")
        check_warmup(self.warmup)

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Turn losses into rewards and weights. The state holds the rewards and the iteration."""
        if signal.iteration < 1:
            raise ValueError(
                "odm mixing needs the iterations done, from which its exploration follows; the signal tells "
                "of none"
            )
        loss_D = loss_of(signal, len(weights_D), self.name)
        if signal.iteration < self.warmup * signal.train_iters:
            return Proposal(weights_D=weights_D.copy(), delta_D=np.zeros(len(weights_D)), state=dict(state))
        if state.get("variant") != self.variant:
            state = {}  # rewards of the other variant mean something else
        before = np.array(state["rewards"]) if state else None
        explored = _exploration(signal.iteration, len(weights_D))
        if self.variant == "smoothed":  # the reward is log R: in R itself a loss above 709 would overflow
            reward_D = math.log1p(-self.decay) + loss_D
            if before is not None and self.decay > 0:
                reward_D = np.logaddexp(math.log(self.decay) + before, reward_D)
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


def check_warmup(warmup: float) -> None:
    """Raise ValueError unless ``warmup`` is a share of the run, from 0 to 1."""
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup {warmup} is not a share of the run's iterations; give a number from 0 to 1")


def _exploration(iteration: int, num_sources: int) -> float:
    """Return the least weight of a source at that iteration."""
    if iteration == 0:
        return 1 / num_sources
    return min(1 / num_sources, math.sqrt(math.log(num_sources) / (num_sources * iteration)))
