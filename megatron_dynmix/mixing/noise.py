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
  and more if neighboring tokens go the same way: a design effect.)

The second is needed for errors of scores, which depend on the noise in one direction of E; one difference
alone would be a wild guess there. What it leaves out is any covariance between layers.

Axes: D sources, L MoE layers compared together, E experts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.gate_loads import gradient, l2_scale


@dataclass(frozen=True, eq=False)
class Noise:
    """What the halves tell about the sampling error of loads.

    Attributes:
        energy_D: V, the expected squared l2 distance of a measured load from the true one.
        size_D: s, the size of the error's covariance in units of diag(o) - o o^T / q.

    """

    energy_D: NDArray[np.float64]
    size_D: NDArray[np.float64]


def measure_noise(
    load_DLE: NDArray[np.float64], first_DLE: NDArray[np.float64], share_D: NDArray[np.float64]
) -> Noise:
    """Estimate energy and size of the noise of each load, see the top of this file.

    Since o = f a + (1 - f) b, the first half is enough: a - b = (a - o) / (1 - f).

    Args:
        load_DLE: measured loads o.
        first_DLE: loads of the first half a, normalized like `load_DLE`.
        share_D: f, the share of a source's counts that is in the first half, above 0 and below 1.

    """
    weight_D = share_D / (1 - share_D)
    squared_DLE = first_DLE - load_DLE
    squared_DLE *= squared_DLE
    energy_D = weight_D * squared_DLE.sum(axis=(1, 2))
    freedom_D = np.count_nonzero(load_DLE, axis=(1, 2)) - load_DLE.shape[1]
    # Where no token of either half went, the difference is 0 and stays it.
    squared_DLE /= np.maximum(load_DLE, np.finfo(np.float64).tiny)
    return Noise(energy_D, weight_D * squared_DLE.sum(axis=(1, 2)) / np.maximum(freedom_D, 1))


def debiased_l2(distance_DD: NDArray[np.float64], noise: Noise) -> NDArray[np.float64]:
    """Return l2 distances of measured loads without what sampling noise adds to them.

    Independent errors e_i, e_j give E |o_i - o_j + e_i - e_j|^2 = |o_i - o_j|^2 + V_i + V_j: noise makes
    sources look further apart, those with few tokens most. V_i + V_j is taken off, down to 0. For halves of
    equal size this is the mean of (a_i - a_j)(b_i - b_j) and (a_i - b_j)(b_i - a_j), products of two
    independent measurements of one difference.
    """
    squared_DD = distance_DD**2 - noise.energy_D[:, None] - noise.energy_D
    np.fill_diagonal(squared_DD, 0.0)
    return np.sqrt(np.maximum(squared_DD, 0.0))


def delta_error(
    load_DLE: NDArray[np.float64],
    noise: Noise,
    metric: str,
    distance_DD: NDArray[np.float64],
    share_DD: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return one standard error of each score, to first order in the noise.

    delta_i = sum_j w_ij distance(o_i, o_j) depends on its own load through G_i = sum_j w_ij g_ij and on
    another's through w_ij g_ji, g_ij being the gradient of distance(o_i, o_j) in o_i. The errors of different
    sources are independent, so with Var_k(g) = sum_e o_ke g_e^2 - sum_layers (sum_e o_ke g_e)^2 / q

        Var(delta_i) = s_i Var_i(G_i) + sum_j w_ij^2 s_j Var_j(g_ji).

    First order: it holds where sources are further apart than their noise; nearer, the error is less.

    Args:
        load_DLE: measured loads.
        noise: their noise.
        metric: a key of `gate_loads.DISTANCES`.
        distance_DD: distances of the measured loads by that metric, not debiased.
        share_DD: w, how much of each distance is in each score, see `delta_shares`; the diagonal is ignored.

    """
    share_DD = np.where(np.eye(len(share_DD), dtype=bool), 0.0, share_DD)
    if metric in ("l2", "scaled-l2"):
        factor = l2_scale(load_DLE) if metric == "scaled-l2" else 1.0
        own_D, other_DD = _l2_variances(load_DLE, distance_DD / factor, share_DD)
    else:
        own_D, other_DD = _variances(load_DLE, share_DD, metric)
        factor = 1.0
    variance_D = noise.size_D * own_D + (share_DD**2 * other_DD.T) @ noise.size_D
    return np.asarray(factor * np.sqrt(variance_D))


def _variances(
    load_DLE: NDArray[np.float64], share_DD: NDArray[np.float64], metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Var_i(G_i), and Var_i(g_ij) for all pairs, by the gradient of any metric; source by source."""
    total_DLE, pair_DD = np.zeros_like(load_DLE), np.zeros_like(share_DD)
    for i in range(len(load_DLE)):
        gradient_DLE = gradient(metric, load_DLE, i)
        pair_DD[i] = _variance(gradient_DLE, load_DLE[i : i + 1])
        total_DLE[i] = (share_DD[i] @ gradient_DLE.reshape(len(load_DLE), -1)).reshape(load_DLE.shape[1:])
    return _variance(total_DLE, load_DLE), pair_DD


def _variance(gradient_DLE: NDArray[np.float64], load_DLE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Var_d(g_d) of every row; a single load serves all rows."""
    weighted_DLE = gradient_DLE * load_DLE
    mean_D = (weighted_DLE.sum(axis=2) ** 2 / load_DLE.sum(axis=2)).sum(axis=1)
    weighted_DLE *= gradient_DLE
    return np.asarray(np.maximum(weighted_DLE.sum(axis=(1, 2)) - mean_D, 0.0))


def _l2_variances(
    load_DLE: NDArray[np.float64], distance_DD: NDArray[np.float64], share_DD: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the same for l2, whose gradient (o_i - o_j) / distance turns the sums into matrix products."""
    load_DV = load_DLE.reshape(len(load_DLE), -1)
    inverse_DD = np.divide(1, distance_DD, out=np.zeros_like(distance_DD), where=distance_DD > 0)
    cross_DD = (load_DV * load_DV) @ load_DV.T
    square_DD = cross_DD.diagonal()[:, None] - 2 * cross_DD + cross_DD.T
    load_LDE = load_DLE.swapaxes(0, 1)
    gram_LDD = load_LDE @ load_LDE.swapaxes(1, 2)
    inner_LDD = gram_LDD.diagonal(axis1=1, axis2=2)[:, :, None] - gram_LDD
    mean_DD = (inner_LDD**2 / load_LDE.sum(axis=2)[:, :, None]).sum(axis=0)
    pair_DD = np.maximum(square_DD - mean_DD, 0.0) * inverse_DD**2
    reach_DD = np.diag((share_DD * inverse_DD).sum(axis=1)) - share_DD * inverse_DD
    return _variance((reach_DD @ load_DV).reshape(load_DLE.shape), load_DLE), pair_DD


def shrink_gaps(
    delta_D: NDArray[np.float64], error_D: NDArray[np.float64], min_gap: float
) -> NDArray[np.float64]:
    """Return scores that differ from their mean only by what noise does not explain.

    gap_i = delta_i - mean(delta) is made smaller by ``min_gap`` standard errors, to 0 where it is less than
    that: continuous, so that a gap does not jump in and out of sight from update to update.
    """
    if min_gap == 0:
        return delta_D
    mean = delta_D.mean()
    gap_D = delta_D - mean
    return np.asarray(mean + np.sign(gap_D) * np.maximum(np.abs(gap_D) - min_gap * error_D, 0.0))
