"""Sampling weights: making them, updating them, keeping them within bounds, measuring them.

A weight is a share of the rows drawn. All rows are equally long, so it is a share of the tokens, padding
included; sources differ in how many examples one of their rows holds. Axes: D sources.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
SUM_TOLERANCE = 1e-9


def is_number(value: object) -> bool:
    """Whether a value is a finite number: no text, no truth value, no integer that float64 cannot hold."""
    if isinstance(value, np.generic):
        value = value.item()
    return type(value) in (int, float) and abs(cast(float, value)) <= sys.float_info.max


def normalise_weights(
    weights: Mapping[str, float] | ArrayLike, sources: Sequence[str] | None = None
) -> Floats:
    """Scale non-negative numbers so that they sum to 1; a weight of 0 is kept: the source is paused.

    The numbers are in any unit. A mapping must hold exactly the `sources` (without them, any names) and is
    read in their order; an array must have their length.
    """
    if isinstance(weights, Mapping):
        names = list(weights) if sources is None else list(sources)
        missing = [name for name in names if name not in weights]
        unknown = [name for name in weights if name not in names]
        if missing or unknown:
            raise ValueError(
                f"weights do not match the sources: missing {missing}, unknown {unknown}; "
                "give one weight per source"
            )
        for name in names:
            if not isinstance(weights[name], float) and not is_number(weights[name]):
                raise ValueError(f"the weight of {name} is {weights[name]!r:.60}; give a finite number >= 0")
        weights = [weights[name] for name in names]
    weights_D = np.array(weights, dtype=np.float64)
    if weights_D.ndim != 1 or weights_D.size == 0:
        raise ValueError(f"weights have shape {weights_D.shape}; give a flat list with one weight per source")
    if sources is not None and len(weights_D) != len(sources):
        raise ValueError(
            f"{len(weights_D)} weights for {len(sources)} sources {list(sources)}; give one each"
        )
    if not np.isfinite(weights_D).all() or (weights_D < 0).any():
        raise ValueError(
            f"weights {weights_D.tolist()} hold a negative, NaN or infinite value; give numbers >= 0"
        )
    with np.errstate(over="ignore"):  # an infinite sum is refused on the next line
        total = float(weights_D.sum())
    if not 0 < total < np.inf:
        raise ValueError(
            f"weights {weights_D.tolist()} sum to {total}; at least one must be > 0, the sum finite"
        )
    return weights_D / total


def check_weights(weights_D: ArrayLike, num_sources: int) -> Floats:
    """Return a read-only copy of weights that are shares of ``num_sources`` sources; refuse all others."""
    checked_D = np.array(weights_D, dtype=np.float64)
    if checked_D.shape != (num_sources,):
        raise ValueError(f"weights have shape {checked_D.shape}; need one for each of {num_sources} sources")
    if not np.isfinite(checked_D).all() or (checked_D < 0).any():
        raise ValueError(f"weights {checked_D.tolist()} hold a negative, NaN or infinite value")
    if abs(float(checked_D.sum()) - 1) > SUM_TOLERANCE:
        raise ValueError(
            f"weights {checked_D.tolist()} sum to {checked_D.sum()}, not to 1; normalise them first"
        )
    checked_D.setflags(write=False)
    return checked_D


def check_step_size(eta: float, smoothing: float) -> None:
    """Raise ValueError unless ``eta`` is finite and >= 0 and ``smoothing`` lies between 0 and 1."""
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta {eta} is not a step size; give a finite number >= 0 (the paper uses 10)")
    if not 0 <= smoothing <= 1:
        raise ValueError(
            f"smoothing {smoothing} is not a share; give a number from 0 to 1 (the paper uses 0.05)"
        )


def reweight(weights_D: Floats, delta_D: Floats, *, eta: float, smoothing: float) -> Floats:
    """Make one weight update, Zhu et al. (2025), section 3: w' = (1 - c) softmax(log w + eta delta) + c / D.

    Of the scores `delta_D` only the differences matter; `eta` is in nats of weight ratio per unit of them.
    `smoothing` is c, the share spread evenly: every new weight is at least c / D, and without it a weight of
    0 stays 0. With equal weights and ``eta`` 0 the new weights are exactly equal.
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


def fit_shares(weights_D: Floats, least_D: Floats, most_D: Floats) -> Floats:
    """Bring weights within bounds, otherwise in proportion to what they were: water-filling.

    Solves sum_i clip(s w_i, least_i, most_i) = 1 for s by fixing variables (Bitran and Hax, Management
    Science 27, 1981): sources outside their bounds on the side that weighs more are fixed there, and the
    rest is shared out again, at most D times. The smallest shares add up to at most 1, the largest to at
    least 1. Where all sources with weight are at their largest share, the others get the rest in equal parts.
    """
    if (weights_D >= least_D).all() and (weights_D <= most_D).all():
        return weights_D
    weighing = weights_D > 0
    if np.where(weighing, most_D, least_D).sum() < 1:
        # Raised first to what they can hold, the weighing sources leave a rest that others must take.
        least_D = np.where(weighing, most_D, least_D)
        weights_D = np.where(weighing, 0.0, 1.0)
    fitted_D = np.zeros_like(weights_D)
    free_D = np.ones(len(weights_D), dtype=bool)
    while free_D.any():
        rest = 1 - fitted_D[~free_D].sum()
        total = weights_D[free_D].sum()
        fitted_D[free_D] = weights_D[free_D] * (rest / total) if total > 0 else 0.0
        low_D, high_D = free_D & (fitted_D < least_D), free_D & (fitted_D > most_D)
        missing = float((least_D - fitted_D)[low_D].sum())
        excess = float((fitted_D - most_D)[high_D].sum())
        fixed_D = low_D if missing >= excess else high_D
        if not fixed_D.any():
            break
        fitted_D[fixed_D] = (least_D if missing >= excess else most_D)[fixed_D]
        free_D &= ~fixed_D
    return fitted_D


RIDGE = 1e-8
"""Added to the diagonal, relative to its mean: of several solutions (equal sources) it picks the even one."""
ROUNDING = 1e-12
"""Gain that counts as none; below what the ridge makes of two equal sources."""


def balancing_weights(distance_VD: Floats) -> Floats:
    """Return the shares w of the columns that minimize ||distance_VD w||; uniform if all are 0.

    Scaling w scales the objective, so with Q = distance^T distance the shares are those of the minimizer of
    u'Qu / 2 - sum u over u >= 0, found by an active set (Lawson & Hanson, 1974, chapter 23).
    """
    num_sources = distance_VD.shape[1]
    largest = np.abs(distance_VD).max()
    if largest == 0:
        return np.full(num_sources, 1 / num_sources)
    scaled_VD = distance_VD / largest
    quadratic_DD = scaled_VD.T @ scaled_VD
    quadratic_DD += RIDGE * quadratic_DD.trace() / num_sources * np.eye(num_sources)
    used = np.zeros(num_sources, dtype=bool)
    solution_D = np.zeros(num_sources)
    while not used.all():
        gain_D = np.where(used, -np.inf, 1 - quadratic_DD @ solution_D)
        entering = int(np.argmax(gain_D))
        if gain_D[entering] <= ROUNDING:
            break
        used[entering] = True
        solution_D = _step(quadratic_DD, solution_D, used)
        if not used[entering]:  # its gain was rounding, for it left at once; it would enter again for ever
            break
    return np.asarray(solution_D / solution_D.sum())


def _step(quadratic_DD: Floats, solution_D: Floats, used: NDArray[np.bool_]) -> Floats:
    """Minimize over the used sources; drop (from ``used`` too) those that would become negative."""
    while True:
        wanted_D = np.zeros_like(solution_D)
        wanted_D[used] = np.linalg.solve(quadratic_DD[np.ix_(used, used)], np.ones(int(used.sum())))
        negative = used & (wanted_D <= 0)
        if not negative.any():
            return wanted_D
        # As far towards the wanted point as all stay >= 0; the source that stops it leaves.
        room_D = np.where(negative, solution_D / np.where(negative, solution_D - wanted_D, 1), np.inf)
        stopping = int(np.argmin(room_D))
        solution_D = solution_D + room_D[stopping] * (wanted_D - solution_D)
        solution_D[stopping] = 0
        used[stopping] = False


def row_shares(weights_D: Floats, examples_per_row_D: Floats) -> Floats:
    """Return the shares of the rows that give shares `weights_D` of the examples.

    A row of source i brings n_i examples on average, so r_i = (w_i / n_i) / sum_j (w_j / n_j). Exact over
    whole epochs, in which every example is drawn once; within an epoch, as even as the rows are. With equal
    `examples_per_row_D` they are `weights_D`, bit for bit.
    """
    return _in_proportion(weights_D, examples_per_row_D, -1)


def example_shares(row_weights_D: Floats, examples_per_row_D: Floats) -> Floats:
    """Return the shares of the examples in rows drawn by `row_weights_D`: the inverse of `row_shares`."""
    return _in_proportion(row_weights_D, examples_per_row_D, 1)


def _in_proportion(weights_D: Floats, examples_per_row_D: Floats, power: int) -> Floats:
    weights_D = check_weights(weights_D, len(weights_D))
    if examples_per_row_D.shape != weights_D.shape:
        raise ValueError(
            f"examples per row have shape {examples_per_row_D.shape}; need one for each of "
            f"{len(weights_D)} sources"
        )
    # every row holds at least one example; NaN is refused too
    if not (np.isfinite(examples_per_row_D) & (examples_per_row_D >= 1)).all():
        raise ValueError(f"examples per row {examples_per_row_D.tolist()} must be finite, and 1 or more")
    if (examples_per_row_D == examples_per_row_D[0]).all():
        return weights_D
    scaled_D = weights_D * examples_per_row_D**power
    return np.asarray(scaled_D / scaled_D.sum())


def entropy(weights_D: Floats) -> float:
    """Return the Shannon entropy of the mix in nats, from 0 (one source) to log D (uniform); 0 log 0 = 0."""
    positive = weights_D[weights_D > 0]
    return max(0.0, -float(np.sum(positive * np.log(positive))))


def unevenness(weights_D: Floats) -> float:
    """Return by how many nats the entropy of a mix is below that of an even one, from 0 to log D.

    The difference of two entropies would lose the digits of nearly even mixes: it falls with the square of
    what they are off. With w_i = (1 + d_i) / D it is the sum of ((1 + d_i) log(1 + d_i) - d_i) / D.
    """
    off_D = len(weights_D) * weights_D - 1
    log_D = np.log1p(off_D, out=np.zeros_like(off_D), where=off_D > -1)
    return max(0.0, float(np.mean((1 + off_D) * log_D - off_D)))


def kl_divergence(new_D: Floats, old_D: Floats) -> float:
    """Return the size of a step from ``old_D`` to ``new_D``: KL(new || old) in nats.

    0 log 0 = 0. A source that comes back from weight 0 makes the step infinite.
    """
    if new_D.shape != old_D.shape:
        raise ValueError(f"new weights have shape {new_D.shape}, old ones {old_D.shape}; they must be equal")
    drawn = new_D > 0
    if (old_D[drawn] == 0).any():
        return float("inf")
    # log(new) - log(old), because the quotient overflows for a tiny old weight. KL is never negative,
    # but its rounding error is, for two equal mixes.
    return max(0.0, float(np.sum(new_D[drawn] * (np.log(new_D[drawn]) - np.log(old_D[drawn])))))
