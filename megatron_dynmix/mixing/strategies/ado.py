"""Adaptive data optimization: weight goes where a scaling law says that the loss still falls.

The law of a source is L(n) = E + A n^-a. Axes: T points of the history, D sources, G exponents tried.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dynmix.mixing.strategies.losses import check_warmup
from megatron_dynmix.mixing.strategy import Proposal, Signal, Strategy, drawn_of, loss_of, size_of
from megatron_dynmix.mixing.weights import Floats

HUBER_WIDTH = 1e-3
"""Log residual above which a point counts by its size and no longer by its square, as published."""
EXPONENTS_G = np.linspace(0.001, 0.8, 41)
"""Exponents tried; the ends are the published soft limits."""
REWEIGHTINGS = 10
MIN_POINTS = 5
"""Fewest points through which three numbers are fitted with something to spare."""


@dataclass(frozen=True, eq=False)
class ScalingLaw:
    """A law per source: loss = floor + drop * (n / n_last)^-exponent, losses in nats, n in rows.

    The floor is E, which no number of rows would undercut; the drop is what is still above it at the last
    point, 0 where the loss does not fall.
    """

    floor_D: Floats
    drop_D: Floats
    exponent_D: Floats
    n_last: float

    def slope_D(self) -> Floats:
        """Return how fast each loss falls per row at the last point: a (L - E) / n, a at least 0.05."""
        return np.maximum(self.exponent_D, 0.05) * self.drop_D / self.n_last


def fit(n_T: Floats, loss_TD: Floats) -> ScalingLaw:
    """Fit a law to each source's losses > 0, for rising n_T > 0; the same input gives the same bits.

    The objective is the published one (Jiang et al., 2025: Huber loss of the log residuals, width 1e-3). For
    a given exponent the law is linear in E and A, so each exponent of a grid is solved by reweighted least
    squares with E, A >= 0, and the best one is taken: no starting points, no solver that may not converge.
    The published soft limit E >= exp(0.5) is left out: fine-tuning losses are often below it.
    """
    n_last = float(n_T[-1])
    basis_GT = (n_T / n_last) ** -EXPONENTS_G[:, None]
    best = [_fit_source(basis_GT, loss_T) for loss_T in loss_TD.T]
    floor_D, drop_D, exponent_D = np.array(best).T
    return ScalingLaw(floor_D=floor_D, drop_D=drop_D, exponent_D=exponent_D, n_last=n_last)


def _fit_source(basis_GT: Floats, loss_T: Floats) -> tuple[float, float, float]:
    weight_GT = np.broadcast_to(loss_T**-2.0, basis_GT.shape)
    for _ in range(REWEIGHTINGS):
        floor_G, drop_G = _least_squares(basis_GT, loss_T, weight_GT)
        residual_GT = np.log((floor_G[:, None] + drop_G[:, None] * basis_GT) / loss_T)
        # d log L = dL / L turns the log residual into a linear one; 1 / |r| beyond the width into Huber's.
        weight_GT = loss_T**-2.0 / np.maximum(np.abs(residual_GT) / HUBER_WIDTH, 1)
    size_GT = np.abs(residual_GT)
    huber_GT = np.where(size_GT > HUBER_WIDTH, HUBER_WIDTH * (size_GT - HUBER_WIDTH / 2), size_GT**2 / 2)
    best = int(np.argmin(huber_GT.sum(axis=1)))
    return float(floor_G[best]), float(drop_G[best]), float(EXPONENTS_G[best])


def _least_squares(basis_GT: Floats, loss_T: Floats, weight_GT: Floats) -> tuple[Floats, Floats]:
    """Return E and A >= 0 of L = E + A basis, weighted; for each exponent at once."""
    total_G = weight_GT.sum(axis=1)
    mean_basis_G = (weight_GT * basis_GT).sum(axis=1) / total_G
    mean_loss_G = (weight_GT * loss_T).sum(axis=1) / total_G
    centred_GT = basis_GT - mean_basis_G[:, None]
    spread_G = (weight_GT * centred_GT**2).sum(axis=1)
    drop_G = (weight_GT * centred_GT * loss_T).sum(axis=1) / spread_G
    # With one of the two at its bound 0, the other is a weighted mean, > 0. E < 0 and A < 0 exclude each
    # other, since the losses are positive and the basis is too.
    through_zero_G = (weight_GT * basis_GT * loss_T).sum(axis=1) / (weight_GT * basis_GT**2).sum(axis=1)
    floor_G = mean_loss_G - drop_G * mean_basis_G
    drop_G = np.where(drop_G < 0, 0, np.where(floor_G < 0, through_zero_G, drop_G))
    floor_G = np.where(drop_G == 0, mean_loss_G, np.where(floor_G < 0, 0, floor_G))
    return floor_G, drop_G


FLOOR = 0.01
"""Least share in the distribution of one update, before it is averaged."""
KEEP = 0.9
"""Share of the old in the two running averages."""
CREDIT_POWER = 0.5
"""How strongly a source's recent share counts as the cause of its falling loss."""
MAX_POINTS = 64
"""Points kept of the history; a state stays small however long the run."""


@dataclass(frozen=True, kw_only=True)
class Ado(Strategy):
    """ADO (Jiang et al., 2025): sources by how fast a fitted power law says that their loss falls.

    Each source's losses over the rows drawn n (of all sources, as published) are fitted by
    L(n) = E + A n^-a (`fit`). With mu the shares of the sizes and h the running share drawn,

        rho_i ~ mu_i h_i^0.5 a_i (L_i - E_i) / n,   at least 0.01 each,
        w = 0.9 avg + 0.1 rho,   avg <- (1 - 1/(t + 1)) avg + rho / (t + 1),   h <- 0.9 h + 0.1 drawn share.

    The authors do this every step and refit every 1,000; here t counts updates and each one refits. Before
    the warm-up is over (published: 1,000 of 60,000 steps), as long as fewer than five losses are known, and
    where no loss falls, rho is mu.

    Attributes:
        warmup: share of the run's iterations whose losses are left out, from 0 to 1.

    """

    warmup: float = 1 / 60

    name = "ado"
    needs_loss = True
    starts = True

    def __post_init__(self) -> None:
        check_warmup(self.warmup)

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Turn losses into laws, slopes and weights; propose the shares of the sizes at first.

        The state holds the running averages and at most 64 points of the history.
        """
        size_D = size_of(signal, len(weights_D), self.name)
        prior_D = size_D / size_D.sum()
        if signal.iteration == 0:
            return Proposal(weights_D=prior_D, delta_D=np.zeros(len(prior_D)))
        drawn_D = drawn_of(signal, len(weights_D), self.name)
        credit_D, average_D = _averages(prior_D, drawn_D, state)
        kept = {"credit": credit_D.tolist(), "drawn": drawn_D.tolist()}
        if signal.iteration < self.warmup * signal.train_iters:
            state_now = {**kept, "average": average_D.tolist(), "updates": 0, "history": [], "stride": 1}
            return Proposal(weights_D=prior_D, delta_D=np.zeros(len(prior_D)), state=state_now)
        loss_D = loss_of(signal, len(weights_D), self.name)
        if (loss_D == 0).any():
            raise ValueError(f"ado mixing fits logarithms, so no loss may be 0: {loss_D.tolist()}")
        update = state.get("updates", 0) + 1
        point = [float(drawn_D.sum()), *loss_D.tolist()]
        points = [*state.get("history", []), point]
        n_T, loss_TD = np.split(np.array(points), [1], axis=1)
        slope_D = np.zeros(len(weights_D))
        if len(np.unique(n_T)) >= MIN_POINTS:
            slope_D = fit(n_T[:, 0], loss_TD).slope_D()
        rho_D = _instant(prior_D * credit_D**CREDIT_POWER * slope_D, prior_D)
        new_D = KEEP * average_D + (1 - KEEP) * rho_D
        average_D = average_D + (rho_D - average_D) / (update + 1)
        history, stride = _thinned(points, update, state.get("stride", 1))
        state_now = {
            **kept, "average": average_D.tolist(), "updates": update, "history": history, "stride": stride
        }  # fmt: skip
        return Proposal(weights_D=new_D / new_D.sum(), delta_D=slope_D, state=state_now)


def _averages(prior_D: Floats, drawn_D: Floats, state: Mapping[str, Any]) -> tuple[Floats, Floats]:
    """Return the running share drawn, this interval included, and the running average of rho."""
    before_D = np.array(state["drawn"]) if state else np.zeros(len(prior_D))
    credit_D = np.array(state["credit"]) if state else prior_D
    average_D = np.array(state["average"]) if state else prior_D
    interval_D = drawn_D - before_D
    if interval_D.sum() > 0:
        credit_D = KEEP * credit_D + (1 - KEEP) * interval_D / interval_D.sum()
    return credit_D, average_D


def _instant(score_D: Floats, prior_D: Floats) -> Floats:
    """Return shares of the scores, none below the floor; the prior where all are 0."""
    rho_D = score_D / score_D.sum() if score_D.any() else prior_D
    rho_D = np.maximum(rho_D, FLOOR)
    return np.asarray(rho_D / rho_D.sum())


def _thinned(points: list[list[float]], update: int, stride: int) -> tuple[list[list[float]], int]:
    """Return the points to keep: every ``stride``-th update's, the stride doubled when they are too many."""
    if update % stride:
        return points[:-1], stride
    if len(points) < MAX_POINTS:
        return points, stride
    return points[1::2], 2 * stride
