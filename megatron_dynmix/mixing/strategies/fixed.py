"""Strategies that never change the weights.

Strategies that weigh sources by their size: chosen once, before the first row is drawn.

Axes: D sources.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import Proposal, Signal, numbers_of, size_of
from megatron_dynmix.mixing.weights import normalise_weights


@dataclass(frozen=True)
class Fixed:
    """The weights stay as given."""

    name: ClassVar[str] = "fixed"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = False

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the current weights; the signal is not read."""
        return Proposal(weights_D=weights_D.copy(), delta_D=np.zeros(len(weights_D)))


@dataclass(frozen=True)
class Uniform:
    """Every source has weight 1 / D from start to end."""

    name: ClassVar[str] = "uniform"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    updates: ClassVar[bool] = False

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the current weights; the signal is not read.

        Raises:
            ValueError: the current weights are not uniform; they would have to be changed without a word.

        """
        if not np.allclose(weights_D, 1 / len(weights_D), rtol=0, atol=1e-9):
            raise ValueError(
                f"uniform mixing was given weights {weights_D.tolist()}; "
                "leave the weights out, or use fixed mixing"
            )
        return Proposal(weights_D=weights_D.copy(), delta_D=np.zeros(len(weights_D)))


@dataclass(frozen=True, kw_only=True)
class FinalStatic:
    """The given weights from start to end, usually those that another run ended with.

    The FinalStatic baseline of Zhu et al. (2025), section 4: whether the path of the weights mattered, or
    only where it ended.

    Attributes:
        weights_D: one number >= 0 per source, in the order of the sources, in any unit.

    Raises:
        ValueError: on construction, for weights that cannot be shares.

    """

    weights_D: Sequence[float]

    name: ClassVar[str] = "final-static"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = True
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._given()

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Propose the given weights; neither the current ones nor the signal is read.

        Raises:
            ValueError: the given weights are for another number of sources.

        """
        given_D = self._given()
        if len(given_D) != len(weights_D):
            raise ValueError(f"final-static has {len(given_D)} weights for {len(weights_D)} sources")
        return Proposal(weights_D=given_D, delta_D=np.zeros(len(given_D)))

    def _given(self) -> NDArray[np.float64]:
        return normalise_weights(numbers_of(self.weights_D, "weight"))


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Sources in proportion to their rows: w_i = n_i / sum n, as if all were one shuffled file.

    The DataSize baseline of Zhu et al. (2025), section 4, with sizes in rows instead of examples: rows are
    what is drawn.
    """

    name: ClassVar[str] = "data-size"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = True
    updates: ClassVar[bool] = False

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Shares of the rows of all sources; the current weights are not read.

        Raises:
            ValueError: the signal has no sizes.

        """
        return _proposal(size_of(signal, len(weights_D), self.name))


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Sizes levelled by a temperature: w_i = n_i^(1/tau) / sum_j n_j^(1/tau).

    1 gives the sizes' own shares, larger values come closer to uniform. The default is that of mT5 (Xue et
    al., 2021, section 3.1: exponent 0.3).

    Attributes:
        temperature: tau > 0.

    Raises:
        ValueError: on construction, for a temperature that is not finite and > 0.

    """

    temperature: float = 1 / 0.3

    name: ClassVar[str] = "temperature"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = True
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Levelled shares of the sizes; the current weights are not read.

        Raises:
            ValueError: the signal has no sizes.

        """
        size_D = size_of(signal, len(weights_D), self.name)
        # Relative to the largest: a small temperature would overflow a plain power.
        return _proposal(np.exp(np.log(size_D / size_D.max()) / self.temperature))


@dataclass(frozen=True, kw_only=True)
class UniMax:
    """As even as can be without drawing any source more than N times: Chung et al. (2023), Algorithm 1.

    From the smallest source to the largest, U_i = min(rows left / sources left, N n_i), and
    w_i = U_i / sum U. The rows to share out are those of the whole run (`Signal.run_rows`). The published N
    is 1 for the umT5 models; 5 and 10 were tried.

    Attributes:
        epoch_cap: N > 0, the most epochs of any source.

    Raises:
        ValueError: on construction, for a cap that is not finite and > 0.

    """

    epoch_cap: float = 1.0

    name: ClassVar[str] = "unimax"
    needs_gate_load: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    starts: ClassVar[bool] = True
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epoch_cap) and self.epoch_cap > 0):
            raise ValueError(f"epoch_cap {self.epoch_cap} is no number of epochs; give a finite number > 0")

    def propose(self, weights_D: NDArray[np.float64], signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Shares of the run's rows; the current weights are not read.

        Raises:
            ValueError: the signal has no sizes or no length of the run, or the run is longer than N epochs of
                all sources together, so that the cap cannot be kept.

        """
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
        return _proposal(share_D)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is finite and > 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature} is unusable; give a finite number > 0")


def _proposal(share_D: NDArray[np.float64]) -> Proposal:
    return Proposal(weights_D=share_D / share_D.sum(), delta_D=np.zeros(len(share_D)))
