"""Strategies that measure nothing: weights that stay, follow from sizes or embeddings, a plan, or chance.

Axes: P points of a plan, D sources, V dimensions of an embedding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_dynmix.mixing.gate_loads import cosine_distance, l2_distance, source_delta
from megatron_dynmix.mixing.strategies.losses import check_temperature
from megatron_dynmix.mixing.strategy import Proposal, Signal, SourceError, Strategy, numbers_of, size_of
from megatron_dynmix.mixing.weights import Floats, check_step_size, normalise_weights, reweight


@dataclass(frozen=True)
class Uniform(Strategy):
    """Every source has weight 1 / D from start to end."""

    name = "uniform"
    updates = False

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the current weights; those that are not uniform would have to be changed without a word."""
        if not np.allclose(weights_D, 1 / len(weights_D), rtol=0, atol=1e-9):
            raise ValueError(
                f"uniform mixing was given weights {weights_D.tolist()}; "
                "leave the weights out, or use fixed mixing"
            )
        return _unscored(weights_D.copy())


@dataclass(frozen=True)
class Fixed(Strategy):
    """The weights stay as given."""

    name = "fixed"
    updates = False

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the current weights."""
        return _unscored(weights_D.copy())


@dataclass(frozen=True, kw_only=True)
class FinalStatic(Strategy):
    """The given weights, in any unit, from start to end, usually those that another run ended with.

    The FinalStatic baseline of Zhu et al. (2025), section 4: whether the path of the weights mattered, or
    only where it ended.
    """

    weights_D: Sequence[float]

    name = "final-static"
    starts = True
    updates = False

    def __post_init__(self) -> None:
        self._given()

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the given weights."""
        given_D = self._given()
        if len(given_D) != len(weights_D):
            raise ValueError(f"final-static has {len(given_D)} weights for {len(weights_D)} sources")
        return _unscored(given_D)

    def _given(self) -> Floats:
        return normalise_weights(numbers_of(self.weights_D, "weight"))


@dataclass(frozen=True, kw_only=True)
class DataSize(Strategy):
    """Sources in proportion to their sizes: w_i = n_i / sum n, as if all were one shuffled file.

    The DataSize baseline of Zhu et al. (2025), section 4. Sizes are rows of the prepared sources, since rows
    are what is drawn, unless others are given: there, those of the originals, of which 20,000 examples each
    were taken.
    """

    sizes_D: Sequence[float] = ()

    name = "data-size"
    starts = True
    updates = False

    def __post_init__(self) -> None:
        if len(self.sizes_D) and not (size_D := numbers_of(self.sizes_D, "size", lowest=0)).all():
            raise SourceError([int(size_D.argmin())], "is 0; give a number > 0", before="size of ")

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the shares of the sizes of all sources."""
        return _shares(self._size_D(signal, len(weights_D)))

    def _size_D(self, signal: Signal, num_sources: int) -> Floats:
        if not len(self.sizes_D):
            return size_of(signal, num_sources, self.name)
        if len(self.sizes_D) != num_sources:
            raise ValueError(
                f"{len(self.sizes_D)} sizes for {num_sources} sources; {self.name} needs one per source"
            )
        return np.array(self.sizes_D, np.float64) / max(self.sizes_D)


@dataclass(frozen=True, kw_only=True)
class Temperature(DataSize):
    """Sizes levelled by a temperature: w_i = n_i^(1/tau) / sum_j n_j^(1/tau).

    1 gives the sizes' own shares, larger values come closer to uniform. The default is that of mT5 (Xue et
    al., 2021, section 3.1: exponent 0.3).

    Attributes:
        temperature: tau > 0.

    """

    temperature: float = 1 / 0.3

    name = "temperature"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose levelled shares of the sizes."""
        size_D = self._size_D(signal, len(weights_D))
        # Relative to the largest: a small temperature would overflow a plain power.
        return _shares(np.exp(np.log(size_D / size_D.max()) / self.temperature))


@dataclass(frozen=True, kw_only=True)
class UniMax(Strategy):
    """As even as can be without drawing any source more than N times: Chung et al. (2023), Algorithm 1.

    From the smallest source to the largest, U_i = min(rows left / sources left, N n_i), and
    w_i = U_i / sum U. The rows to share out are those of the whole run (`Signal.run_rows`). The published N
    is 1 for the umT5 models; 5 and 10 were tried.

    Attributes:
        epoch_cap: N > 0, the most epochs of any source.

    """

    epoch_cap: float = 1.0

    name = "unimax"
    starts = True
    updates = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epoch_cap) and self.epoch_cap > 0):
            raise ValueError(f"epoch_cap {self.epoch_cap} is no number of epochs; give a finite number > 0")

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose shares of the run's rows, unless it is too long for the cap to be kept."""
        size_D = size_of(signal, len(weights_D), self.name)
        rows_left = float(signal.run_rows)
        if rows_left <= 0:
            raise ValueError(
                "unimax mixing needs the rows that the whole run draws; the signal does not tell"
            )
        cap_D = self.epoch_cap * size_D
        if rows_left > cap_D.sum() * (1 + 1e-12):
            raise ValueError(
                f"the run draws {signal.run_rows} rows, {self.epoch_cap:g} epochs of all sources hold only "
                f"{cap_D.sum():.0f}; set epoch_cap to at least {rows_left / size_D.sum():.4g}, or train less"
            )
        share_D = np.zeros_like(cap_D)
        smallest_first = np.argsort(size_D, kind="stable")
        for done, source in enumerate(smallest_first):
            share_D[source] = min(rows_left / (len(cap_D) - done), cap_D[source])
            rows_left -= share_D[source]
        return _shares(share_D)


EMBEDDING_DISTANCES = {"l2": l2_distance, "cos": cosine_distance}
"""Distances that mean something for vectors of any sign; the others of `DISTANCES` want shares."""


@dataclass(frozen=True, kw_only=True)
class SentenceEmbedding(Strategy):
    """Static weights from one embedding per source, by one update of Zhu et al. (2025), Algorithm 1.

    The SentEmb baseline of section 4: mean distance to the other sources' embeddings, softmax of
    log w + eta times that, smoothed by c; then the weights stay. The embeddings, usually means over the
    examples of a source, are used as given; the paper does not name its encoder.

    Attributes:
        eta: step size >= 0.
        smoothing: c, the share spread evenly over the sources, from 0 to 1.
        metric: distance between embeddings: ``l2`` or ``cos``.

    """

    embeddings_DV: Sequence[Sequence[float]]
    eta: float = 10.0
    smoothing: float = 0.05
    metric: str = "l2"

    name = "sent-emb"
    starts = True
    updates = False

    def __post_init__(self) -> None:
        check_step_size(self.eta, self.smoothing)
        if self.metric not in EMBEDDING_DISTANCES:
            raise ValueError(
                f"metric {self.metric!r} cannot compare embeddings; give one of {sorted(EMBEDDING_DISTANCES)}"
            )
        try:
            vectors_DV = np.asarray(self.embeddings_DV, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError("the embeddings are not number vectors of one length, one per source") from None
        if vectors_DV.ndim != 2 or not np.isfinite(vectors_DV).all():
            raise ValueError(
                f"the embeddings have shape {vectors_DV.shape}; give one finite vector per source"
            )

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Turn embeddings into distances, deltas and weights."""
        if len(self.embeddings_DV) != len(weights_D):
            raise ValueError(
                f"{len(self.embeddings_DV)} embeddings for {len(weights_D)} sources; give one each"
            )
        distance_DD = EMBEDDING_DISTANCES[self.metric](np.asarray(self.embeddings_DV, dtype=np.float64))
        delta_D = source_delta(distance_DD, "mean")
        new_D = reweight(weights_D, delta_D, eta=self.eta, smoothing=self.smoothing)
        return Proposal(weights_D=new_D, delta_D=delta_D, distance_DD=distance_DD)


INTERPOLATIONS = ("steps", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Schedule(Strategy):
    """Weights given for some iterations, held or blended in between; after the last they stay.

    Between points (iteration, weights) at iterations a < b, the first at 0, with t = (k - a) / (b - a):
    ``steps`` keeps the weights of a, ``linear`` takes (1 - t) w_a + t w_b, ``cosine`` the same with
    (1 - cos(pi t)) / 2 for t. The weights, in any unit, are those at the iteration of the update and hold for
    the interval that follows.

    Attributes:
        interpolation: ``steps``, ``linear`` or ``cosine``.

    """

    points: Sequence[tuple[int, Sequence[float]]]
    interpolation: str = "steps"

    name = "schedule"
    starts = True

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown; give one of {INTERPOLATIONS}")
        iterations, weights_PD = self._plan()
        if iterations[0] != 0:
            raise ValueError(
                f"the first point of the schedule is at iteration {iterations[0]}; the run starts at 0: add "
                "its weights there"
            )
        for earlier, later in pairwise(iterations):
            if later <= earlier:
                raise ValueError(f"iteration {later} follows {earlier} in the schedule; iterations must rise")
        if len({len(weights_D) for weights_D in weights_PD}) > 1:
            raise ValueError("the points of the schedule have weights for different numbers of sources")

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the plan's weights at this iteration."""
        iterations, weights_PD = self._plan()
        if len(weights_PD[0]) != len(weights_D):
            raise ValueError(
                f"the schedule is for {len(weights_PD[0])} sources; the run has {len(weights_D)}"
            )
        last = int(np.searchsorted(iterations, signal.iteration, side="right")) - 1
        planned_D = weights_PD[last]
        if self.interpolation != "steps" and last + 1 < len(iterations):
            done = (signal.iteration - iterations[last]) / (iterations[last + 1] - iterations[last])
            if self.interpolation == "cosine":
                done = (1 - np.cos(np.pi * done)) / 2
            planned_D = (1 - done) * planned_D + done * weights_PD[last + 1]
        return _unscored(planned_D.copy())

    def _plan(self) -> tuple[list[int], list[Floats]]:
        """Return the iterations, and the shares at each."""
        if isinstance(self.points, str) or not self.points:
            raise ValueError("the schedule has no points; give [[0, weights], [iteration, weights], ...]")
        iterations, weights_PD = [], []
        for point in self.points:
            if not (isinstance(point, Sequence) and len(point) == 2 and _is_iteration(point[0])):
                raise ValueError(f"point {point!r} of the schedule is not [iteration, weights]")
            iterations.append(int(point[0]))
            try:
                weights_PD.append(normalise_weights(numbers_of(point[1], "weight")))
            except SourceError as error:
                raise error.within(f"schedule at iteration {point[0]}") from None
            except ValueError as error:
                raise ValueError(f"schedule at iteration {point[0]}: {error}") from None
        return iterations, weights_PD


def _is_iteration(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


OTHERS = 1e-5
"""Weight of every source but one, before all are divided by their sum: that of the official code."""


@dataclass(frozen=True, kw_only=True)
class Sequential(Strategy):
    """One source after the other, in the order of the configuration, round and round.

    The Sequential baseline of Zhu et al. (2025), section 4: weights [1, 1e-5, ...], moved on by one source
    every 500 iterations. Which source is due follows from the iteration alone; it changes at the first update
    at or after each multiple of ``every``, so the interval should divide it.

    Attributes:
        every: iterations per source, >= 1.

    """

    every: int = 500

    name = "sequential"
    starts = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every {self.every} is no number of iterations; give a whole number >= 1")

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose nearly all weight on the source that is due."""
        return _one_source(signal.iteration // self.every % len(weights_D), len(weights_D))


@dataclass(frozen=True, kw_only=True)
class Random(Strategy):
    """New random weights at every update: w_i = u_i / sum u with u_i from U(0, 1).

    The Random baseline of Zhu et al. (2025), section 4; not uniform on the simplex. The weights of the first
    interval are the configured ones, as there. The dice are thrown from (seed, iteration) only.
    """

    name = "random"

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose random shares."""
        # 1 - [0, 1) lies in (0, 1], so the sum is never 0.
        return _shares(1 - _dice(signal).random(len(weights_D)))


@dataclass(frozen=True, kw_only=True)
class RandomBatch(Strategy):
    """One source, drawn again at every update, gets weight 1, all others 1e-5.

    In the official code of Zhu et al. (2025) only; the paper does not use it. The weights of the first
    interval are the configured ones. The dice are thrown from (seed, iteration) only.
    """

    name = "random-batch"

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose nearly all weight on one source by chance."""
        return _one_source(int(_dice(signal).integers(len(weights_D))), len(weights_D))


def _dice(signal: Signal) -> np.random.Generator:
    return np.random.default_rng([signal.seed, signal.iteration])


def _one_source(chosen: int, num_sources: int) -> Proposal:
    share_D = np.full(num_sources, OTHERS)
    share_D[chosen] = 1
    return _shares(share_D)


def _shares(share_D: Floats) -> Proposal:
    return _unscored(share_D / share_D.sum())


def _unscored(weights_D: Floats) -> Proposal:
    return Proposal(weights_D=weights_D, delta_D=np.zeros(len(weights_D)))
