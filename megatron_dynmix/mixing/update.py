"""The exponentiated-gradient step that turns scores into weights.

Axes: D sources.
"""

import math

import numpy as np
from numpy.typing import NDArray


def check_step_size(eta: float, smoothing: float) -> None:
    """Raise ValueError unless ``eta`` is finite and >= 0 and ``smoothing`` lies between 0 and 1."""
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta {eta} is not a step size; give a finite number >= 0 (the paper uses 10)")
    if not 0 <= smoothing <= 1:
        raise ValueError(
            f"smoothing {smoothing} is not a share; give a number from 0 to 1 (the paper uses 0.05)"
        )


def reweight(
    weights_D: NDArray[np.float64], delta_D: NDArray[np.float64], *, eta: float, smoothing: float
) -> NDArray[np.float64]:
    """One weight update, Zhu et al. (2025), section 3: w' = (1 - c) softmax(log w + eta delta) + c / D.

    Args:
        weights_D: current weights, >= 0, summing to 1. A weight of 0 stays 0 before smoothing.
        delta_D: scores; only their differences matter. May be negative.
        eta: step size, in nats of weight ratio per unit of delta.
        smoothing: c, the share spread evenly; every new weight is at least c / D.

    Returns:
        New weights_D, summing to 1. With equal weights and ``eta`` 0 the entries are exactly equal.

    Raises:
        ValueError: lengths differ, a value is not finite, a weight is negative, all are 0, or ``eta`` or
            ``smoothing`` is out of range.

    """
    check_step_size(eta, smoothing)
    if weights_D.ndim != 1 or weights_D.shape != delta_D.shape:
        raise ValueError(
            f"weights {weights_D.shape} and delta {delta_D.shape} must both have one value per source"
        )
    if not np.isfinite(weights_D).all() or (weights_D < 0).any() or not weights_D.any():
        raise ValueError(f"weights {weights_D.tolist()} must be finite and >= 0, with at least one > 0")
    with np.errstate(over="ignore"):  # an overflow is refused on the next line, with both factors named
        score_D = eta * delta_D
    if not np.isfinite(score_D).all():
        raise ValueError(f"eta {eta} times delta {delta_D.tolist()} is not finite")
    # w exp(s) / sum is softmax(log w + s) without log(0), and gives w back when all scores are equal.
    # The shift keeps exp <= 1; paused sources must not set it, or the others could all underflow.
    score_D = np.where(weights_D > 0, score_D, -np.inf)
    alpha_D = weights_D * np.exp(score_D - score_D.max())
    alpha_D /= alpha_D.sum()
    smoothed_D = (1 - smoothing) * alpha_D + smoothing / len(alpha_D)
    return np.asarray(smoothed_D / smoothed_D.sum())
