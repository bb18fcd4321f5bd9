"""What an override file may say, and what the controller makes of it."""

import json
import math

import numpy as np
import pytest

from megatron_dynmix.mixing.controller import ControllerState, MixingController
from megatron_dynmix.mixing.guardrails import Guardrails, Override, parse_override
from megatron_dynmix.mixing.strategies.gate_load import GateLoad
from megatron_dynmix.mixing.strategies.planned import Fixed, Uniform
from megatron_dynmix.mixing.strategy import Remark, Signal

SOURCES = ("code", "math", "chat")
START_D = np.array([0.5, 0.3, 0.2])
SIGNAL = Signal(counts_DLE=np.array([[[9, 1, 2]], [[3, 4, 5]], [[4, 4, 4]]]))


def test_what_a_file_may_say():
    assert parse_override({"pause": ["math"]}, SOURCES) == Override(pause=("math",))
    assert parse_override({"weights": {"chat": 1, "math": 3, "code": 4}}, SOURCES) == Override(
        weights={"code": 0.5, "math": 0.375, "chat": 0.125}
    )
    assert parse_override({"weights": {"chat": 0, "math": 0.5}, "pause": ["code"]}, SOURCES) == Override(
        weights={"math": 1.0, "chat": 0.0}, pause=("code",)
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "an object"),
        ({}, "not empty"),
        ({"weight": {}}, "no 'weight'"),
        ({"pause": "math"}, "list of source names"),
        ({"pause": [1]}, "list of source names"),
        ({"pause": []}, "pauses nothing"),
        ({"pause": ["maths"]}, "did you mean math"),
        ({"pause": ["math", "math"]}, "twice"),
        ({"pause": ["math", "code", "chat"]}, "pauses every source"),
        ({"weights": [1, 2, 3]}, "source: number"),
        ({"weights": {"code": 1, "math": 1}}, "lacks chat"),
        ({"weights": {"code": 1, "math": 1, "chat": 1, "law": 1}}, "'law'"),
        ({"weights": {"code": 1, "math": 1, "chat": 1}, "pause": ["chat"]}, "paused sources have none"),
        ({"weights": {"code": 1, "math": 1, "chat": -1}}, "weight of chat is -1"),
        ({"weights": {"code": 1, "math": 1, "chat": True}}, "weight of chat is True"),
        ({"weights": {"code": 1, "math": 1, "chat": "1"}}, "weight of chat is '1'"),
        ({"weights": {"code": 1, "math": 1, "chat": math.nan}}, "weight of chat is nan"),
        ({"weights": {"code": 0, "math": 0, "chat": 0}}, "sum to 0"),
        ({"weights": {"code": 10**400, "math": 0, "chat": 0}}, "weight of code is 1000"),
        ({"weights": {"code": 1e308, "math": 1e308, "chat": 1e308}}, "sum to inf"),
    ],
)
def test_anything_else_is_refused_in_one_line(content, problem):
    with pytest.raises(ValueError, match=problem) as refusal:
        parse_override(content, SOURCES)
    assert "\n" not in str(refusal.value)


def test_weights_of_the_operator_win_over_strategy_and_guardrails():
    controller = MixingController(SOURCES, START_D, GateLoad(), guardrails=Guardrails(floor=0.2))
    override = parse_override({"weights": {"code": 0.9, "math": 0.1}, "pause": ["chat"]}, SOURCES)
    decision = controller.update(SIGNAL, override)
    assert controller.weights_D.tolist() == [0.9, 0.1, 0]
    assert decision.events == (
        Remark("override", "override: weights set to code 0.9, math 0.1"),
        Remark("override", "override: chat paused"),
    )
    assert decision.proposal.weights_D.tolist() != [0.9, 0.1, 0]


def test_a_paused_source_comes_back_with_the_share_it_had():
    controller = MixingController(SOURCES, START_D, GateLoad(eta=0, smoothing=0))
    for _ in range(2):
        decision = controller.update(SIGNAL, Override(pause=("math",)))
        assert decision.events == (Remark("override", "override: math paused"),)
        np.testing.assert_allclose(controller.weights_D, [5 / 7, 0, 2 / 7], atol=1e-15)
    controller.update(SIGNAL)
    np.testing.assert_allclose(controller.weights_D, START_D, atol=1e-15)


@pytest.mark.parametrize("order", [("math", "code"), ("code", "math")])
def test_pauses_that_overlap_are_undone_exactly(order):
    controller = MixingController(SOURCES, START_D, GateLoad(eta=0, smoothing=0))
    controller.update(SIGNAL, Override(pause=order[:1]))
    controller.update(SIGNAL, Override(pause=order))
    assert controller.weights_D.tolist() == [0, 0, 1]
    saved = json.loads(json.dumps(controller.state.to_json()))
    controller.update(SIGNAL)
    np.testing.assert_allclose(controller.weights_D, START_D, atol=1e-15)
    resumed = MixingController(SOURCES, START_D, GateLoad(eta=0, smoothing=0))
    resumed.resume(ControllerState.from_json(saved))
    resumed.update(SIGNAL)
    assert resumed.weights_D.tobytes() == controller.weights_D.tobytes()


def test_sources_paused_together_come_back_together():
    controller = MixingController(SOURCES, START_D, GateLoad(eta=0, smoothing=0))
    controller.update(SIGNAL, Override(pause=("code", "math")))
    assert controller.weights_D.tolist() == [0, 0, 1]
    controller.update(SIGNAL)
    np.testing.assert_allclose(controller.weights_D, START_D, atol=1e-15)


@pytest.mark.parametrize(("strategy", "first_D"), [(Fixed(), START_D), (Uniform(), np.full(3, 1 / 3))])
def test_weights_that_never_change_come_back_when_the_override_ends(strategy, first_D):
    controller = MixingController(SOURCES, first_D, strategy)
    controller.update(Signal(), Override(weights={"code": 1.0, "math": 0.0, "chat": 0.0}))
    assert controller.weights_D.tolist() == [1, 0, 0]
    controller.update(Signal(), Override(pause=("math",)))
    assert controller.weights_D[1] == 0
    controller.update(Signal())
    assert controller.weights_D.tobytes() == first_D.tobytes()


def test_a_run_may_begin_with_a_pause():
    controller = MixingController(SOURCES, START_D, GateLoad(eta=0, smoothing=0))
    controller.start(Signal(), Override(pause=("chat",)))
    np.testing.assert_allclose(controller.weights_D, [0.625, 0.375, 0], atol=1e-15)
    controller.update(SIGNAL)
    np.testing.assert_allclose(controller.weights_D, START_D, atol=1e-15)
