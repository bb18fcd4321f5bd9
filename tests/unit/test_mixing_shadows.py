"""Shadows change nothing: not by what they need, nor by what they refuse."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_dynmix.mixing.controller import MixingController
from megatron_dynmix.mixing.strategies.gate_load import GateLoad
from megatron_dynmix.mixing.strategies.losses import LossSoftmax, OnlineDataMixing
from megatron_dynmix.mixing.strategy import Signal

SOURCES = ("code", "math", "chat")
THIRDS_D = np.full(3, 1 / 3)
HALVES_HDLE = np.array([[[[5, 1, 1]], [[2, 2, 3]], [[2, 2, 2]]], [[[4, 0, 1]], [[1, 2, 2]], [[2, 2, 2]]]])
LOSS_D = np.array([1.0, 2.0, 3.0])


def measured(halves_HDLE, loss_D=LOSS_D):
    return Signal(
        counts_DLE=halves_HDLE.sum(axis=0), half_counts_HDLE=halves_HDLE, loss_D=loss_D, iteration=100
    )


def scarce(half, dataset_id=1):
    """The next interval: of one source rows of one half only, and those other than before."""
    halves_HDLE = HALVES_HDLE.copy()
    halves_HDLE[half, dataset_id] = 0
    halves_HDLE[1 - half, dataset_id] = [[1, 7, 1]]
    return measured(halves_HDLE)


@pytest.mark.parametrize("signals", [[measured(HALVES_HDLE), scarce(0)], [scarce(1), scarce(0)]])
@pytest.mark.parametrize("careful", [GateLoad(min_gap=0.1), GateLoad(debias=True)])
def test_a_shadow_that_needs_halves_leaves_the_weights_as_they_are(signals, careful):
    alone = MixingController(SOURCES, THIRDS_D, GateLoad())
    watched = MixingController(SOURCES, THIRDS_D, GateLoad(), shadows={"careful": careful})
    careful_alone = MixingController(SOURCES, THIRDS_D, careful)
    for signal in signals:
        decision = watched.update(signal)
        assert alone.update(signal).weights_D.tobytes() == decision.weights_D.tobytes()
        careful_decision = careful_alone.update(signal)
        assert decision.shadow["careful"].weights_D.tobytes() == careful_decision.weights_D.tobytes()


def test_what_is_recorded_gives_every_strategy_the_same_answer_again():
    def new():
        return MixingController(SOURCES, THIRDS_D, GateLoad(), shadows={"careful": GateLoad(min_gap=0.1)})

    run, replay = new(), new()
    for signal in (measured(HALVES_HDLE), scarce(0), scarce(1, dataset_id=2)):
        decision = run.update(signal)
        again = replay.update(decision.signal)
        assert again.weights_D.tobytes() == decision.weights_D.tobytes()
        shadows = again.shadow["careful"], decision.shadow["careful"]
        assert shadows[0].weights_D.tobytes() == shadows[1].weights_D.tobytes()


def test_rows_of_one_half_only_are_named_where_the_halves_are_needed():
    careful = MixingController(SOURCES, THIRDS_D, GateLoad(min_gap=0.1))
    note = "weights kept: no tokens in both halves measured yet from math"
    assert [remark.text for remark in careful.update(scarce(0)).notes] == [note]
    careful.update(measured(HALVES_HDLE))
    note = "no tokens in both halves in this interval, last known halves used: math"
    assert [remark.text for remark in careful.update(scarce(0)).notes] == [note]


@pytest.mark.parametrize(
    ("strategy", "shadow", "broken"),
    [
        (GateLoad(), OnlineDataMixing(), {"loss_D": np.array([1.0, np.inf, 1.0])}),
        (GateLoad(), LossSoftmax(), {"loss_D": None}),
        (LossSoftmax(), GateLoad(), {"counts_DLE": -HALVES_HDLE.sum(axis=0)}),
        (GateLoad(), GateLoad(min_gap=2), {"half_counts_HDLE": None}),
    ],
)
def test_what_only_a_shadow_needs_and_cannot_use_fails_the_shadow_only(strategy, shadow, broken):
    signal = replace(measured(HALVES_HDLE), **broken)
    watched = MixingController(SOURCES, THIRDS_D, strategy, shadows={"watching": shadow})
    decision = watched.update(signal)
    assert decision.notes[0].kind == "shadow_failed"
    alone = MixingController(SOURCES, THIRDS_D, strategy)
    assert decision.weights_D.tobytes() == alone.update(signal).weights_D.tobytes()
