"""A power law through a source's losses: L(n) = E + A n^-a.

Axes: T points, D sources, G exponents tried.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HUBER_WIDTH = 1e-3
"""Log residual above which a point counts by its size and no longer by its square, as published."""
EXPONENTS_G = np.linspace(0.001, 0.8, 41)
"""Exponents tried; the ends are the published soft limits."""
REWEIGHTINGS = 10
MIN_POINTS = 5
"""Fewest points through which three numbers are fitted with something to spare."""


@dataclass(frozen=True, eq=False)
class ScalingLaw:
    """A law per source: loss = floor + drop * (n / n_last)^-exponent.

    Attributes:
        floor_D: E, the loss that no number of rows would undercut, in nats.
        drop_D: what is still above that at the last point, in nats; 0 where the loss does not fall.
        exponent_D: a.
        n_last: rows at the last point.

    """

    floor_D: NDArray[np.float64]
    drop_D: NDArray[np.float64]
    exponent_D: NDArray[np.float64]
    n_last: float

    def slope_D(self) -> NDArray[np.float64]:
        """How fast each loss falls per row at the last point: a (L - E) / n, a at least 0.05 as published."""
        return np.maximum(self.exponent_D, 0.05) * self.drop_D / self.n_last


def fit(n_T: NDArray[np.float64], loss_TD: NDArray[np.float64]) -> ScalingLaw:
    """Fit a law to each source's losses; the same input gives the same bits.

    The objective is the published one (Jiang et al., 2025: Huber loss of the log residuals, width 1e-3). For
    a given exponent the law is linear in E and A, so each exponent of a grid is solved by reweighted least
    squares with E, A >= 0, and the best one is taken: no starting points, no solver that may not converge.
    The published soft limit E >= exp(0.5) is left out: fine-tuning losses are often below it.

    Args:
        n_T: rows drawn up to each point, > 0, rising.
        loss_TD: mean losses, > 0, in nats.

    """
    n_last = float(n_T[-1])
    basis_GT = (n_T / n_last) ** -EXPONENTS_G[:, None]
    best = [_fit_source(basis_GT, loss_T) for loss_T in loss_TD.T]
    floor_D, drop_D, exponent_D = np.array(best).T
    return ScalingLaw(floor_D=floor_D, drop_D=drop_D, exponent_D=exponent_D, n_last=n_last)


def _fit_source(basis_GT: NDArray[np.float64], loss_T: NDArray[np.float64]) -> tuple[float, float, float]:
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


def _least_squares(
    basis_GT: NDArray[np.float64], loss_T: NDArray[np.float64], weight_GT: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """E and A >= 0 of L = E + A basis, weighted; for each exponent at once."""
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
