"""How far gate loads are off because they were measured on few tokens, told from two halves of those.

The even and the odd rows of source i give two loads a_i, b_i, independent and with the same mean; the load
is their mean by tokens, o_i = f_i a_i + (1 - f_i) b_i. If one token had covariance S_i, rows drawn
independently, a_i would have S_i / n_a, b_i S_i / n_b and o_i S_i / (n_a + n_b), so

    Cov(o_i) = f_i (1 - f_i) Cov(a_i - b_i),    with f_i (1 - f_i) = n_a n_b / (n_a + n_b)^2.

S_i need not be known, nor what the tokens of a row have in common: rows, not tokens, are what is drawn. From
one difference d_i = a_i - b_i two numbers are estimated per source:

- the energy V_i = f_i (1 - f_i) |d_i|^2, whose mean is the expected squared error tr Cov(o_i);
- the size s_i of a covariance of multinomial shape, s_i (diag(o) - o o^T / q) in each layer with its sum q.
  Since tr(diag(o)^-1 (diag(o) - o o^T / q)) = m - 1 for m experts in use,
  s_i = f_i (1 - f_i) sum_e d_ie^2 / o_ie / sum_layers (m - 1). (For independent choices s_i n_i is about 1,
  and more if neighbouring tokens go the same way: a design effect.)

The second is needed for errors of scores, which depend on the noise in one direction of E; one difference
alone would be a wild guess there. What it leaves out is any covariance between layers.

Axes: H = 2 halves, D sources, K chosen layers, E experts (in ``load_DE``: of all chosen layers).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.distance import gradient, l2_scale


@dataclass(frozen=True, eq=False)
class Noise:
    """What the halves tell of the sampling error of loads.

    Attributes:
        energy_D: V, the expected squared l2 distance of a measured load from the true one.
        size_D: s, the size of the error's covariance in units of diag(o) - o o^T / q.

    """

    energy_D: NDArray[np.float64]
    size_D: NDArray[np.float64]


def measure_noise(
    load_DKE: NDArray[np.float64], first_DKE: NDArray[np.float64], share_D: NDArray[np.float64]
) -> Noise:
    """Energy and size of the noise of each load, see the top of this file.

    Since o = f a + (1 - f) b, the first half is enough: a - b = (a - o) / (1 - f).

    Args:
        load_DKE: measured loads o.
        first_DKE: loads of the first half a, normalised like `load_DKE`.
        share_D: f, the share of a source's counts that is in the first half, above 0 and below 1.

    """
    weight_D = share_D / (1 - share_D)
    squared_DKE = first_DKE - load_DKE
    squared_DKE *= squared_DKE
    energy_D = weight_D * squared_DKE.sum(axis=(1, 2))
    freedom_D = np.count_nonzero(load_DKE, axis=(1, 2)) - load_DKE.shape[1]
    # Where no token of either half went, the difference is 0 and stays it.
    squared_DKE /= np.maximum(load_DKE, np.finfo(np.float64).tiny)
    return Noise(energy_D, weight_D * squared_DKE.sum(axis=(1, 2)) / np.maximum(freedom_D, 1))


def debiased_l2(distance_DD: NDArray[np.float64], noise: Noise) -> NDArray[np.float64]:
    """L2 distances without what sampling noise adds to them.

    Independent errors e_i, e_j give E |o_i - o_j + e_i - e_j|^2 = |o_i - o_j|^2 + V_i + V_j: noise makes
    sources look further apart, those with few tokens most. V_i + V_j is taken off, down to 0. For halves of
    equal size this is the mean of (a_i - a_j)(b_i - b_j) and (a_i - b_j)(b_i - a_j), products of two
    independent measurements of one difference.

    Args:
        distance_DD: `l2_distance` of the measured loads.
        noise: of the same loads.

    """
    squared_DD = distance_DD**2 - noise.energy_D[:, None] - noise.energy_D
    np.fill_diagonal(squared_DD, 0.0)
    return np.sqrt(np.maximum(squared_DD, 0.0))


def delta_error(
    load_DKE: NDArray[np.float64],
    noise: Noise,
    metric: str,
    distance_DD: NDArray[np.float64],
    share_DD: NDArray[np.float64],
) -> NDArray[np.float64]:
    """One standard error of each score, to first order in the noise.

    delta_i = sum_j w_ij distance(o_i, o_j) depends on its own load through G_i = sum_j w_ij g_ij and on
    another's through w_ij g_ji, g_ij being the gradient of distance(o_i, o_j) in o_i. The errors of different
    sources are independent, so with Var_k(g) = sum_e o_ke g_e^2 - sum_layers (sum_e o_ke g_e)^2 / q

        Var(delta_i) = s_i Var_i(G_i) + sum_j w_ij^2 s_j Var_j(g_ji).

    First order: it holds where sources are further apart than their noise; nearer, the error is less.

    Args:
        load_DKE: measured loads.
        noise: of these loads.
        metric: see `distance.gradient`.
        distance_DD: distances of the measured loads by that metric, not debiased.
        share_DD: w, how much of each distance is in each score, see `delta_shares`; the diagonal counts not.

    """
    share_DD = np.where(np.eye(len(share_DD), dtype=bool), 0.0, share_DD)
    if metric in ("l2", "scaled-l2"):
        factor = l2_scale(load_DKE[0].size) if metric == "scaled-l2" else 1.0
        own_D, other_DD = _l2_variances(load_DKE, distance_DD / factor, share_DD)
    else:
        own_D, other_DD = _variances(load_DKE, share_DD, metric)
        factor = 1.0
    variance_D = noise.size_D * own_D + (share_DD**2 * other_DD.T) @ noise.size_D
    return np.asarray(factor * np.sqrt(variance_D))


def _variances(
    load_DKE: NDArray[np.float64], share_DD: NDArray[np.float64], metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Var_i(G_i), and Var_i(g_ij) for all pairs, by the gradient of any metric; source by source."""
    flat_DE = load_DKE.reshape(len(load_DKE), -1)
    total_DE, pair_DD = np.zeros_like(flat_DE), np.zeros_like(share_DD)
    for i in range(len(flat_DE)):
        gradient_DE = gradient(metric, flat_DE[i], flat_DE)
        pair_DD[i] = _variance(gradient_DE, load_DKE[i : i + 1])
        total_DE[i] = share_DD[i] @ gradient_DE
    return _variance(total_DE, load_DKE), pair_DD


def _variance(gradient_DE: NDArray[np.float64], load_DKE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Var_d(g_d) of every row; loads of one source stand for all rows."""
    gradient_DKE = gradient_DE.reshape(-1, *load_DKE.shape[1:])
    weighted_DKE = gradient_DKE * load_DKE
    mean_D = (weighted_DKE.sum(axis=2) ** 2 / load_DKE.sum(axis=2)).sum(axis=1)
    weighted_DKE *= gradient_DKE
    return np.asarray(np.maximum(weighted_DKE.sum(axis=(1, 2)) - mean_D, 0.0))


def _l2_variances(
    load_DKE: NDArray[np.float64], distance_DD: NDArray[np.float64], share_DD: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same for l2, whose gradient (o_i - o_j) / distance turns the sums into matrix products."""
    flat_DE = load_DKE.reshape(len(load_DKE), -1)
    inverse_DD = np.divide(1, distance_DD, out=np.zeros_like(distance_DD), where=distance_DD > 0)
    squared_DE = flat_DE * flat_DE
    cross_DD = squared_DE @ flat_DE.T
    square_DD = cross_DD.diagonal()[:, None] - 2 * cross_DD + cross_DD.T
    load_KDE = load_DKE.swapaxes(0, 1)
    gram_KDD = load_KDE @ load_KDE.swapaxes(1, 2)
    inner_KDD = gram_KDD.diagonal(axis1=1, axis2=2)[:, :, None] - gram_KDD
    mean_DD = (inner_KDD**2 / load_KDE.sum(axis=2)[:, :, None]).sum(axis=0)
    pair_DD = np.maximum(square_DD - mean_DD, 0.0) * inverse_DD**2
    reach_DD = np.diag((share_DD * inverse_DD).sum(axis=1)) - share_DD * inverse_DD
    return _variance(reach_DD @ flat_DE, load_DKE), pair_DD


def shrink_gaps(
    delta_D: NDArray[np.float64], error_D: NDArray[np.float64], min_gap: float
) -> NDArray[np.float64]:
    """Scores that differ from their mean only by what noise does not explain.

    gap_i = delta_i - mean(delta) is made smaller by ``min_gap`` standard errors, to 0 where it is less than
    that: continuous, so that a gap does not jump in and out of sight from update to update.

    Args:
        delta_D: scores.
        error_D: one standard error of each.
        min_gap: how many of them a gap must exceed; 0 leaves the scores as they are.

    """
    if min_gap == 0:
        return delta_D
    mean = delta_D.mean()
    gap_D = delta_D - mean
    return np.asarray(mean + np.sign(gap_D) * np.maximum(np.abs(gap_D) - min_gap * error_D, 0.0))
