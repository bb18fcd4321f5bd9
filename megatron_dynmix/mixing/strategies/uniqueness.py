"""Weights that count kinds of data instead of sources: what is like others shares its weight with them.

Similarity comes from gate loads. With S_ij the squared distance of two loads, summed over layers, V_i the
expected squared error of a load (see `strategies.gate_load`) and F_ij what chance makes of it at the most,

    d_ij^2 = max(S_ij - V_i - V_j, 0),    Z_ij = 1 - t d_ij / max d,  t = max (1 - F_ij (V_i + V_j) / S_ij).

Where no pair is further apart than chance explains, t and with it all distances count as 0: one kind. Chance
is not tested pair by pair: a source whose load is uncertain would then count as like every other.

Noise that is taken off leaves an uncertain source close to all others: it would get less and less, and be
measured by less and less. So counts go back until V_i is at most 1 / 400 of max d^2 for every source, and as
long as it is above 1 / 200 likeness counts in proportion, and weights stay near the prior.

Axes: H = 2 halves, D sources, L chosen layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_dynmix.mixing.gate_loads import NO_GAP, at_layers, check_layers, gate_load, l2_distance
from megatron_dynmix.mixing.strategy import (
    Counts,
    Proposal,
    Remark,
    Signal,
    SourceError,
    Strategy,
    Wrapped,
    numbers_of,
)
from megatron_dynmix.mixing.weights import Floats, normalise_weights

SAME = 0.9
"""Similarity from which on sources begin to count as one kind."""
NOISE = 0.005
"""Expected squared error of a load, in largest squared distances, up to which it is known well enough."""
AIM = NOISE / 2
"""To what it is brought where earlier counts can do that: it is known only roughly itself."""


@dataclass(frozen=True, eq=False)
class Likeness:
    """How alike sources are, and what it was found from."""

    load_DLE: Floats
    distance_DD: Floats
    """Root mean square over the layers, what noise adds taken off."""
    error_DD: Floats
    """How much larger a distance is that lies one standard error above it; 0 where noise was left in."""
    alike_DD: Floats
    """Z, from 0 to 1."""
    noise_D: Floats
    """Expected squared error of each load in largest squared distances, at most 1; 0 with noise left in."""

    @property
    def told_apart(self) -> bool:
        """Whether any two sources are further apart than noise explains."""
        return bool((self.alike_DD < 1).any())

    def unique_D(self, alike_from: float, known_DD: Floats | float = 1.0) -> Floats:
        """Return what each source has for itself, above 0 and at most 1; 1 / n for one of n copies.

        Sources whose similarity is at most `alike_from` count as nothing alike, and it as 0; `known_DD` is
        the part of what is left that counts.

        One over the number of sources like it: its ordinariness in the sense of Leinster and Cobbold (Ecology
        93, 2012), sum_j Z_ij. There a source that was split into parts would count as many. So each counts as
        1 / m_j and shares with its own, m_j being the number of sources of its kind (as in the sequence
        weights of Henikoff and Henikoff, 1994): fully those that cannot be told from it, in part near copies.
        """
        kind_D = self._counted(SAME, known_DD).sum(axis=1)
        return np.asarray(1 / (kind_D * (self._counted(alike_from, known_DD) @ (1 / kind_D))))

    def _counted(self, least: float, known_DD: Floats | float) -> Floats:
        """Return similarities counted from `least` on, up to 1."""
        beyond_DD = np.maximum((self.alike_DD - least) / (1 - least), 0)
        return np.where(np.eye(len(beyond_DD), dtype=bool), 1, known_DD * beyond_DD)


def likeness(signal: Signal, layers: str | Sequence[int], min_gap: float, who: str) -> Likeness:
    """Compare the gate loads of all sources, each layer for itself; ValueError for a signal without them.

    With `min_gap` 0 noise is left in, and no halves are needed.
    """
    if signal.counts_DLE is None:
        raise ValueError(f"{who} needs token counts per expert; the signal holds none")
    load_DLE = gate_load(signal.counts_DLE, layers, by_layer=True)
    num_sources, num_layers, _ = load_DLE.shape
    squared_DD = np.sum([l2_distance(load_DLE[:, layer]) ** 2 for layer in range(num_layers)], axis=0)
    sure, error_DD, noise_D = 1.0, np.zeros_like(squared_DD), np.zeros(num_sources)
    if min_gap > 0:
        if signal.half_counts_HDLE is None:
            raise ValueError(f"{who} with min_gap needs the counts in two halves; there are none")
        energy_D = _energy(load_DLE, at_layers(signal.half_counts_HDLE, layers), who)
        noise_DD = energy_D[:, None] + energy_D
        chance_DD = _most_by_chance(load_DLE, energy_D, min_gap)
        apart_DD = squared_DD > chance_DD
        sure = 1 - float(np.min(chance_DD[apart_DD] / squared_DD[apart_DD], initial=1))
        itself_DD = np.eye(num_sources, dtype=bool)
        squared_DD = np.where(itself_DD, 0, np.maximum(squared_DD - noise_DD, 0))
        freedom_D = _freedom(load_DLE)
        # of |x|^2, where x has k independent parts, each with the variance v / k: (4 |x|^2 v + 2 v^2) / k
        variance_DD = 2 * noise_DD * (2 * squared_DD + noise_DD) / ((freedom_D[:, None] + freedom_D) / 2)
        error_DD = np.sqrt(squared_DD + np.sqrt(np.where(itself_DD, 0, variance_DD))) - np.sqrt(squared_DD)
        noise_D = energy_D / max(squared_DD.max(), energy_D.max(), np.finfo(np.float64).tiny)
    distance_DD = np.sqrt(squared_DD)
    far = distance_DD.max()  # no mean or quantile: those change as copies are added
    away_DD = sure * distance_DD / far if far > 0 else distance_DD
    return Likeness(
        load_DLE,
        distance_DD / math.sqrt(num_layers),
        error_DD / math.sqrt(num_layers),
        np.where(away_DD > NO_GAP, 1 - away_DD, 1),
        noise_D,
    )


@dataclass(frozen=True, eq=False)
class SoFar:
    """What is known of likeness at an update, by counts of earlier ones too."""

    found: Likeness
    known_DD: Floats | float
    """The part of each similarity that counts."""
    state: dict[str, Any]
    """What is to be remembered for the next update."""

    def unique_D(self, alike_from: float) -> Floats:
        """Return what each source has for itself, as far as that is known."""
        return self.found.unique_D(alike_from, self.known_DD)

    @property
    def notes(self) -> tuple[Remark, ...]:
        """What a reader must know about it."""
        known = float(np.min(self.known_DD))
        if len(self.found.load_DLE) == 1:
            return ()
        if not self.found.told_apart:
            text = "no two sources can be told apart by their gate loads: they count as one kind"
            return (Remark("one_kind", text),)
        if known < 1:
            text = f"loads are not known well enough yet: likeness counts by {known:.0%} at the least"
            return (Remark("uncertain", text),)
        return ()


def likeness_so_far(
    signal: Signal, layers: str | Sequence[int], min_gap: float, who: str, state: Mapping[str, Any]
) -> SoFar:
    """Compare gate loads as `likeness` does, by counts of earlier updates too; ValueError likewise.

    As many of the earlier counts are added, the same share of every source's, as it takes to know the least
    certain load well enough: all loads are then of the same time. Of a source that brought nothing new all
    counts are kept. Nothing is remembered where those of one update are enough, nor where every update
    measures the same rows: there weights do not decide what is measured. `state` is what was to be remembered
    at the last one.
    """
    new_HDLE = signal.half_counts_HDLE
    if min_gap == 0 or new_HDLE is None or new_HDLE.shape[1] < 2 or signal.same_rows:
        return SoFar(likeness(signal, layers, min_gap, who), 1.0, {})
    new_HDLE = at_layers(new_HDLE, layers)
    old_HDLE = np.array(state.get("half_counts", np.zeros_like(new_HDLE)))
    if old_HDLE.shape != new_HDLE.shape:
        raise ValueError(
            f"{who} remembers counts of shape {old_HDLE.shape}, the signal has {new_HDLE.shape}; resume with "
            "the same model and layers"
        )
    stale_D = np.zeros(new_HDLE.shape[1], dtype=bool) if signal.stale_D is None else signal.stale_D
    # of a stale source what is given is a part of what is remembered, if anything is
    held_D = stale_D & (old_HDLE.sum(axis=(0, 2, 3)) > 0)
    held_HDLE = np.where(held_D[:, None, None], old_HDLE, 0)
    old_HDLE, new_HDLE = (np.where(held_D[:, None, None], 0, given) for given in (old_HDLE, new_HDLE))

    def at(share: float) -> tuple[Likeness, Counts]:
        all_HDLE = new_HDLE + held_HDLE + (share * old_HDLE).astype(old_HDLE.dtype)
        of_all = replace(signal, counts_DLE=all_HDLE.sum(axis=0), half_counts_HDLE=all_HDLE)
        return likeness(of_all, "all", min_gap, who), all_HDLE

    old_D, new_D = (counts.sum(axis=(0, 2, 3)) for counts in (old_HDLE, new_HDLE))
    share = float(old_D.any())
    found, all_HDLE = at(share)
    if share > 0:
        wanted_D = (old_D + new_D) * found.noise_D / AIM
        share = min(float(np.max((wanted_D - new_D) / np.maximum(old_D, 1), initial=0, where=~held_D)), 1)
        found, all_HDLE = at(share) if share < 1 else (found, all_HDLE)
    known_D = NOISE / np.maximum(found.noise_D, NOISE)
    # one that is not drawn will not be known better: the others do not wait for it
    known_D = np.where(stale_D, known_D, known_D.min(initial=1, where=~stale_D))
    known_DD = np.minimum(known_D[:, None], known_D)
    enough = share == 0 and known_D.min() == 1 and not held_D.any()
    return SoFar(found, known_DD, {} if enough else {"half_counts": all_HDLE.tolist()})


def _freedom(load_DLE: Floats) -> Floats:
    """Return as how many independent numbers each load varies.

    A load with covariance C counts as (tr C)^2 / tr C^2 numbers, those of one layer: all layers saw the same
    tokens.
    """
    power_1, power_2, power_3 = (np.sum(load_DLE**power, axis=2) for power in (1, 2, 3))
    trace_DL = power_1 - power_2
    freedom_DL = trace_DL**2 / np.maximum(power_2 - 2 * power_3 + power_2**2, np.finfo(np.float64).tiny)
    return np.asarray(np.maximum(freedom_DL.mean(axis=1), 1))


def _energy(load_DLE: Floats, half_counts_HDLE: Counts, who: str) -> Floats:
    """Return the expected squared error of each source's load, all layers together."""
    total_HDL = half_counts_HDLE.sum(axis=3)
    if not total_HDL.all():
        raise SourceError(
            np.flatnonzero((total_HDL == 0).any(axis=(0, 2))).tolist(),
            f"must have tokens in both halves of the rows: how far they disagree tells {who} the noise; "
            "measure more rows",
        )
    share_DL1 = (total_HDL[0] / total_HDL.sum(axis=0))[:, :, None]
    first_DLE = half_counts_HDLE[0] / total_HDL[0][:, :, None]
    return np.asarray((share_DL1 / (1 - share_DL1) * (first_DLE - load_DLE) ** 2).sum(axis=(1, 2)))


def _most_by_chance(load_DLE: Floats, energy_D: Floats, min_gap: float) -> Floats:
    """Return what the squared distance of two equal loads may come to by chance.

    Over V_i + V_j, its mean, which is estimated from as few numbers, it is distributed like F; by Wilson and
    Hilferty (1931) its cube root is nearly normal, so z standard errors of that are a quadratic equation.
    Without bound where V_i + V_j is too uncertain to tell. z is `min_gap` for one pair, sqrt(min_gap^2 +
    2 log n) for n of them, which keeps the chance that any is told apart by mistake.
    """
    freedom_D = _freedom(load_DLE)
    own_D, noise_DD = energy_D**2 / freedom_D, energy_D[:, None] + energy_D
    below_DD = noise_DD**2 / np.maximum(own_D[:, None] + own_D, np.finfo(float).tiny)
    above_DD = (freedom_D[:, None] + freedom_D) / 2
    pairs = max(len(load_DLE) * (len(load_DLE) - 1) / 2, 1)
    z_squared = min_gap**2 + 2 * math.log(pairs)
    c_DD, d_DD = 2 / (9 * np.maximum(below_DD, 1)), 2 / (9 * above_DD)
    a_DD, b_DD = 1 - c_DD, 1 - d_DD
    divisor_DD = a_DD**2 - z_squared * c_DD
    root_DD = np.sqrt(z_squared * np.maximum(a_DD**2 * d_DD + b_DD**2 * c_DD - z_squared * c_DD * d_DD, 0))
    enough = divisor_DD > 0
    cube_root_DD = (a_DD * b_DD + root_DD) / np.where(enough, divisor_DD, 1)
    return np.where(enough, noise_DD * cube_root_DD**3, np.inf)


@dataclass(frozen=True, kw_only=True)
class Uniqueness(Strategy):
    """Kinds of data in proportion to the prior: w_i ~ p_i u_i, u_i being what source i has for itself.

    Sources that are copies of each other share what one of them would get; sources equally far from each
    other, and sources that noise alone tells apart, have the prior. Nothing is accumulated, so no drift
    ends in a corner: from an even prior no source gets more than 1 / 2, nor less than 1 / D^2.

    Attributes:
        layers: MoE layers whose loads are compared: ``all``, ``last``, or a list of them, counted from 0.
        min_gap: standard errors that some two loads must be apart, more the more pairs there are, before
            anything counts; 0 leaves the noise in.
        alike_from: similarity from which on two sources share, from 0 (whatever is alike in part shares in
            part) to below 1; with 0.9 copies and near copies share.
        average: share of the updates before in the new weights, from 0 (none) to below 1.

    """

    layers: str | Sequence[int] = "all"
    min_gap: float = 2.0
    alike_from: float = SAME
    average: float = 0.0
    prior_D: Sequence[float] = ()

    name = "uniqueness"
    needs_gate_load = True

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if not (math.isfinite(self.min_gap) and self.min_gap >= 0):
            raise ValueError(
                f"min_gap {self.min_gap} is not a number of standard errors; give one >= 0 (2 is usual)"
            )
        for option in ("alike_from", "average"):
            if not 0 <= getattr(self, option) < 1:
                raise ValueError(
                    f"{option} {getattr(self, option)} is not a share; give a number from 0 to below 1"
                )
        if len(self.prior_D):
            normalise_weights(numbers_of(self.prior_D, "prior"))

    @property
    def needs_halves(self) -> bool:  # type: ignore[override]
        """Whether `Signal.half_counts_HDLE` must be measured."""
        return self.min_gap > 0

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Turn counts into similarities and weights; the current weights are not read."""
        so_far = likeness_so_far(signal, self.layers, self.min_gap, f"{self.name} mixing", state)
        found = so_far.found
        prior_D = np.array(self.prior_D) if len(self.prior_D) else np.ones(len(weights_D))
        if not len(prior_D) == len(found.load_DLE) == len(weights_D):
            raise ValueError(
                f"counts for {len(found.load_DLE)} sources and a prior for {len(prior_D)}; {self.name} "
                f"mixing has weights for {len(weights_D)}"
            )
        unique_D = so_far.unique_D(self.alike_from)
        new_D = normalise_weights(prior_D * unique_D)
        if "mean" in state:
            new_D = normalise_weights((1 - self.average) * new_D + self.average * np.array(state["mean"]))
        return Proposal(
            weights_D=new_D,
            delta_D=unique_D,
            load_DLE=found.load_DLE,
            distance_DD=found.distance_DD,
            state={**so_far.state, **({"mean": new_D.tolist()} if self.average else {})},
            notes=so_far.notes,
        )


class Corrected(Wrapped):
    """A strategy in which sources that are alike share what one of them would get, as in `Uniqueness`.

    It goes on from the weights in force without the correction, which would otherwise add up.
    """

    def __init__(self, inner: Strategy) -> None:
        super().__init__(inner)
        self._moves = inner.updates
        self.starts = inner.starts or not inner.updates  # which may have to refuse the weights it is to keep
        self.needs_gate_load = self.needs_halves = self.updates = True
        self.layers = Uniqueness.layers

    def propose(self, weights_D: Floats, signal: Signal, state: Mapping[str, Any]) -> Proposal:
        """Ask the strategy, unless its weights stay, and correct what it says."""
        if "plain" in state and not self._moves:
            plain_D = np.array(state["plain"])
            proposal = Proposal(weights_D=plain_D, delta_D=np.zeros(len(plain_D)))
        else:
            plain_D = weights_D / np.array(state.get("unique", 1.0))
            proposal = super().propose(plain_D / plain_D.sum(), signal, state.get("inner", {}))
        kept = {"plain": proposal.weights_D.tolist(), "inner": proposal.state}
        if signal.counts_DLE is None:  # the first weights: nothing is measured yet
            return replace(proposal, state=kept)
        so_far = likeness_so_far(
            *(signal, self.layers, Uniqueness.min_gap, f"similarity_correction of {self.name}"),
            state.get("remembered", {}),
        )
        unique_D = so_far.unique_D(Uniqueness.alike_from)
        return replace(
            proposal,
            weights_D=normalise_weights(proposal.weights_D * unique_D),
            state={**kept, "unique": unique_D.tolist(), "remembered": so_far.state},
            notes=(*proposal.notes, *so_far.notes),
        )
