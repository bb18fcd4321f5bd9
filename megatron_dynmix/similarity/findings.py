"""What gate loads of all sources say of them: a function of the counts.

Axes: H = 2 halves, D sources, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.controller import MixingController
from megatron_dynmix.mixing.strategies import build_strategy
from megatron_dynmix.mixing.strategies.uniqueness import SAME, Likeness, Uniqueness, likeness
from megatron_dynmix.mixing.strategy import Counts, Signal

RULES = ("uniform", "data-size", "gate-load", "uniqueness")
"""What each of these would begin with is told."""


@dataclass(frozen=True)
class Joint:
    """Two groups of sources that are joined, and how unlike they are: 1 - likeness, the mean of all pairs."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    height: float


@dataclass(frozen=True, kw_only=True)
class Layer:
    """How well one MoE layer tells the sources apart."""

    layer: int
    """0-based, of the MoE layers."""
    distance: float
    """Root mean square of the distances of all pairs, what noise adds taken off."""
    separation: float
    """The same over its mean standard error."""
    told_apart: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """All that the page and the JSON tell."""

    sources: Sequence[str]
    likeness: Likeness
    layers: Sequence[Layer]
    """The best first."""
    joints: Sequence[Joint]
    """From the most alike on; the last joins all."""
    kinds: Sequence[Sequence[str]]
    """Sources that count as one, by name."""
    weights: Mapping[str, Sequence[float]]
    """By rule."""
    refusals: Mapping[str, str]
    """Why a rule has no weights for these sources."""

    def to_json(self) -> dict[str, Any]:
        """Return it in JSON's own types."""
        found = self.likeness
        return {
            "sources": list(self.sources),
            "distance": found.distance_DD.tolist(),
            "distance_error": found.error_DD.tolist(),
            "likeness": found.alike_DD.tolist(),
            "told_apart": found.told_apart,
            "kinds": [list(kind) for kind in self.kinds],
            "unique": found.unique_D(Uniqueness.alike_from).tolist(),
            "layers": [vars(layer) for layer in self.layers],
            "tree": [vars(joint) for joint in self.joints],
            "weights": {rule: list(weights) for rule, weights in self.weights.items()},
            "refusals": dict(self.refusals),
            "load": found.load_DLE.tolist(),
        }


def findings(sources: Sequence[str], half_counts_HDLE: Counts, size_D: NDArray[np.int64]) -> Findings:
    """Compare sources by their counts and numbers of rows; ValueError if one has no tokens."""
    signal = Signal(counts_DLE=half_counts_HDLE.sum(axis=0), half_counts_HDLE=half_counts_HDLE, size_D=size_D)
    found = likeness(signal, "all", Uniqueness.min_gap, "similarity")
    joints = average_linkage(1 - found.alike_DD)
    weights, refusals = {}, {}
    for rule in RULES:
        try:
            weights[rule] = _first_weights(rule, sources, signal)
        except ValueError as error:
            refusals[rule] = str(error)
    return Findings(
        sources=sources,
        likeness=found,
        layers=sorted(
            (_layer(signal, layer) for layer in range(half_counts_HDLE.shape[2])),
            key=lambda layer: -layer.separation,
        ),
        joints=joints,
        kinds=[[sources[d] for d in kind] for kind in _kinds(joints, len(sources))],
        weights=weights,
        refusals=refusals,
    )


def average_linkage(far_DD: NDArray[np.float64]) -> list[Joint]:
    """Join the two nearest groups again and again, by the mean distance of their pairs.

    Source: Sokal and Michener, University of Kansas Science Bulletin 38 (1958).
    """
    groups: list[tuple[int, ...]] = [(d,) for d in range(len(far_DD))]
    joints = []
    while len(groups) > 1:
        height, one, other = min(
            (float(far_DD[np.ix_(left, right)].mean()), one, other)
            for other, right in enumerate(groups)
            for one, left in enumerate(groups[:other])
        )
        joints.append(Joint(groups[one], groups[other], height))
        groups = [group for place, group in enumerate(groups) if place not in (one, other)]
        groups.append(joints[-1].left + joints[-1].right)
    return joints


def _kinds(joints: Sequence[Joint], num_sources: int) -> list[list[int]]:
    """Return the groups below the height at which sources cease to count as one, largest first."""
    kinds = {d: [d] for d in range(num_sources)}
    for joint in joints:
        if joint.height <= 1 - SAME:
            kind = sorted(joint.left + joint.right)
            kinds.update(dict.fromkeys(kind, kind))
    unique = {tuple(kind): kind for kind in kinds.values()}
    return sorted(unique.values(), key=lambda kind: (-len(kind), kind))


def _layer(signal: Signal, layer: int) -> Layer:
    found = likeness(signal, [layer], Uniqueness.min_gap, f"similarity in layer {layer}")
    pairs = ~np.eye(len(found.distance_DD), dtype=bool)
    distance = float(np.sqrt(np.mean(found.distance_DD[pairs] ** 2)))
    error = float(np.mean(found.error_DD[pairs]))
    return Layer(
        layer=layer,
        distance=distance,
        separation=distance / error if error > 0 else 0.0,
        told_apart=found.told_apart,
    )


def _first_weights(rule: str, sources: Sequence[str], signal: Signal) -> list[float]:
    """Return the weights after one update from an even mix, or those that the rule begins with."""
    even_D = np.full(len(sources), 1 / len(sources))
    controller = MixingController(sources, even_D, build_strategy(rule, {}))
    ask = controller.update if controller.updates else controller.start
    weights: list[float] = ask(signal).weights_D.tolist()
    return weights
