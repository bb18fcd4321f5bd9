"""What must hold for every strategy, whatever it measures."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_fixtures import (
    NAMES,
    later,
    options_for,
    permuted_options,
    permuted_signal,
    signal_for,
    strategy_for,
    uniform,
)

from megatron_dynmix.mixing.controller import ControllerState, MixingController
from megatron_dynmix.mixing.strategies import STRATEGIES, build_strategy

checked = settings(max_examples=25, derandomize=True)
every_strategy = pytest.mark.parametrize("name", NAMES)
ORDERED = {"sequential", "random", "random-batch"}
"""Strategies whose answer depends on the order of the sources: each source has its turn or its own dice."""


@st.composite
def worlds(draw):
    """Number of sources, and a generator for all numbers: hypothesis shrinks both."""
    return draw(st.integers(3, 9)), np.random.default_rng(draw(st.integers(0, 10**6)))


def weights_for(name, num_sources, rng):
    if name == "uniform":
        return uniform(num_sources)
    weights_D = rng.uniform(0.01, 1, num_sources)
    return weights_D / weights_D.sum()


@every_strategy
@checked
@given(worlds())
def test_weights_are_shares_and_at_least_the_floor(name, world):
    num_sources, rng = world
    strategy = strategy_for(name, num_sources, rng)
    signal = signal_for(num_sources, rng)
    weights_D, state = weights_for(name, num_sources, rng), {}
    for _ in range(4):
        proposal = strategy.propose(weights_D, signal, state)
        weights_D, state = proposal.weights_D, proposal.state
        assert abs(weights_D.sum() - 1) <= 1e-12
        assert (weights_D >= getattr(strategy, "smoothing", 0) / num_sources - 1e-15).all()
        assert proposal.delta_D.shape == weights_D.shape
        assert np.isfinite(proposal.delta_D).all()
        signal = later(signal, rng)


@every_strategy
@checked
@given(worlds())
def test_the_same_question_has_the_same_answer_and_leaves_its_arguments_alone(name, world):
    num_sources, rng = world
    strategy = strategy_for(name, num_sources, rng)
    signal = signal_for(num_sources, rng)
    weights_D = weights_for(name, num_sources, rng)
    state = strategy.propose(weights_D, signal, {}).state
    signal = later(signal, rng)
    before = copy.deepcopy((weights_D, vars(signal), state))
    first = strategy.propose(weights_D, signal, state)
    second = strategy.propose(weights_D, signal, state)
    np.testing.assert_array_equal(first.weights_D, second.weights_D)
    assert first.state == second.state
    np.testing.assert_equal((weights_D, vars(signal), state), before)
    first.weights_D[:] = 0
    np.testing.assert_array_equal(weights_D, before[0])


@pytest.mark.parametrize("name", sorted(set(NAMES) - ORDERED))
@checked
@given(worlds())
def test_permuting_sources_permutes_the_result(name, world):
    num_sources, rng = world
    options = options_for(name, num_sources, rng)
    order = rng.permutation(num_sources)
    here, there = build_strategy(name, options), build_strategy(name, permuted_options(options, order))
    signal = signal_for(num_sources, rng)
    weights_D, here_state, there_state = weights_for(name, num_sources, rng), {}, {}
    for _ in range(6):
        proposal = here.propose(weights_D, signal, here_state)
        permuted = there.propose(weights_D[order], permuted_signal(signal, order), there_state)
        np.testing.assert_allclose(permuted.weights_D, proposal.weights_D[order], rtol=0, atol=1e-9)
        here_state, there_state = proposal.state, permuted.state
        signal = later(signal, rng)


@every_strategy
@checked
@given(worlds())
def test_a_state_that_was_saved_and_loaded_gives_equal_bits(name, world):
    num_sources, rng = world
    strategy = strategy_for(name, num_sources, rng)
    signals = [signal_for(num_sources, rng)]
    for _ in range(9):
        signals.append(later(signals[-1], rng))
    weights_D = saved_D = weights_for(name, num_sources, rng)
    state, saved = {}, "{}"
    for signal in signals:
        proposal = strategy.propose(weights_D, signal, state)
        weights_D, state = proposal.weights_D, proposal.state
        resumed = strategy.propose(saved_D, signal, json.loads(saved))
        saved_D, saved = resumed.weights_D, json.dumps(resumed.state, allow_nan=False)
        assert weights_D.tolist() == saved_D.tolist()


@every_strategy
def test_a_strategy_says_what_it_is_and_needs(name):
    kind = STRATEGIES[name]
    assert kind.name == name
    for part in ("needs_gate_load", "needs_loss", "starts", "updates"):
        assert isinstance(getattr(kind, part), bool)
    assert (kind.__doc__ and "\n" in kind.__doc__.strip()) or name in ("uniform", "fixed")


@pytest.mark.parametrize("name", [name for name in NAMES if STRATEGIES[name].starts])
def test_a_strategy_that_starts_does_so_with_nothing_measured(name):
    rng = np.random.default_rng(3)
    strategy = strategy_for(name, 4, rng)
    signal = signal_for(4, rng, iteration=0)
    bare = type(signal)(**{**vars(signal), "counts_DLE": None, "loss_D": None, "drawn_D": np.zeros(4, int)})
    assert abs(strategy.propose(uniform(4), bare, {}).weights_D.sum() - 1) <= 1e-12


@every_strategy
def test_what_is_not_announced_is_not_needed(name):
    rng = np.random.default_rng(4)
    strategy = strategy_for(name, 4, rng)
    signal = signal_for(4, rng)
    unmeasured = {} if strategy.needs_gate_load else {"counts_DLE": None}
    unmeasured |= {} if strategy.needs_loss else {"loss_D": None}
    bare = type(signal)(**{**vars(signal), **unmeasured})
    np.testing.assert_array_equal(
        strategy.propose(uniform(4), bare, {}).weights_D, strategy.propose(uniform(4), signal, {}).weights_D
    )


@every_strategy
def test_a_controller_runs_it_from_start_to_end_and_can_be_resumed_anywhere(name):
    rng = np.random.default_rng(6)
    options = options_for(name, 4, rng)

    def controller():
        return MixingController("abcd", uniform(4), build_strategy(name, options))

    through, signal = controller(), signal_for(4, rng, iteration=0)
    through.start(signal)
    for _ in range(12):
        signal = later(signal, rng)
        resumed = controller()
        saved = json.loads(json.dumps(through.state.to_json(), allow_nan=False))
        resumed.resume(ControllerState.from_json(saved))
        through.update(signal)
        resumed.update(signal)
        assert resumed.weights_D.tolist() == through.weights_D.tolist()
        assert resumed.state.to_json() == through.state.to_json()
