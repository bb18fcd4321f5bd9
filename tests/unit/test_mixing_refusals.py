"""Inputs the pure mixing functions refuse, and exact values at the edges."""

import math

import numpy as np
import pytest

from megatron_dynmix.mixing.gate_loads import (
    at_layers,
    cosine_distance,
    gate_load,
    l2_distance,
    select_layers,
    source_delta,
)
from megatron_dynmix.mixing.strategies.gate_load import GateLoad
from megatron_dynmix.mixing.strategies.planned import Fixed, Uniform
from megatron_dynmix.mixing.strategy import Signal
from megatron_dynmix.mixing.weights import check_weights, entropy, kl_divergence, normalise_weights, reweight

NAN, INF = math.nan, math.inf
COUNTS_DLE = np.arange(1, 25).reshape(3, 2, 4)


def test_layers_are_chosen_by_word_or_index():
    assert select_layers("last", 4) == [3]
    assert select_layers("all", 3) == [0, 1, 2]
    assert select_layers([2, 0], 3) == [2, 0]


@pytest.mark.parametrize("layers", ["first", "", [], [0, 0], [-1], [3], [0, 7], [1.5], [True]])
def test_layers_refused(layers):
    with pytest.raises(ValueError, match="layer"):
        select_layers(layers, 3)


def test_a_model_without_moe_layers_is_refused():
    with pytest.raises(ValueError, match="0 MoE layers"):
        select_layers("last", 0)


def test_load_concatenates_the_chosen_layers():
    load_DLE = gate_load(np.array([[[1, 3], [9, 9], [2, 2]]]), [0, 2])
    assert load_DLE.tolist() == [[[0.125, 0.375], [0.25, 0.25]]]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([0, 0], "no routed tokens"),
        ([-1, 2], "negative"),
        ([-1, 1], "negative"),
        ([NAN, 1], "NaN"),
        ([INF, 1], "infinite"),
    ],
)
def test_load_names_the_source_it_refuses(row, problem):
    with pytest.raises(ValueError, match=f"source 1 .*{problem}"):
        gate_load(np.array([[[1, 2]], [row]], dtype=float), "last")


def test_load_needs_three_axes():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        gate_load(np.ones((2, 3)), "last")


def test_distances_by_hand():
    load_DE = np.array([[0.6, 0.8], [0.8, 0.6]])
    assert l2_distance(load_DE)[0, 1] == pytest.approx(math.sqrt(0.08), abs=1e-15)
    assert cosine_distance(load_DE)[0, 1] == pytest.approx(1 - 0.96, abs=1e-15)


def test_distance_refusals():
    with pytest.raises(ValueError, match="finite"):
        l2_distance(np.array([[NAN, 1.0]]))
    with pytest.raises(ValueError, match=r"source 1 .*zeros"):
        cosine_distance(np.array([[1.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="aggregate 'median'"):
        source_delta(np.zeros((3, 3)), "median")
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        source_delta(np.zeros((2, 3)), "mean")
    with pytest.raises(ValueError, match="finite"):
        source_delta(np.array([[0.0, INF], [INF, 0.0]]), "mean")


@pytest.mark.parametrize(
    ("weights", "delta", "eta", "smoothing"),
    [
        ([0.5, 0.5], [0, 0], -1, 0),
        ([0.5, 0.5], [0, 0], NAN, 0),
        ([0.5, 0.5], [0, 0], INF, 0),
        ([0.5, 0.5], [0, 0], 1, -0.1),
        ([0.5, 0.5], [0, 0], 1, 1.1),
        ([0.5, 0.5], [0, 0], 1, NAN),
        ([0.5, 0.5], [0, 0, 0], 1, 0),
        ([[0.5, 0.5]], [[0, 0]], 1, 0),
        ([0.5, NAN], [0, 0], 1, 0),
        ([1.5, -0.5], [0, 0], 1, 0),
        ([0, 0], [0, 0], 1, 0),
        ([0.5, 0.5], [0, NAN], 1, 0),
        ([0.5, 0.5], [0, 1e300], 1e300, 0),
    ],
)
def test_reweight_refusals(weights, delta, eta, smoothing):
    with pytest.raises(ValueError):
        reweight(np.array(weights, float), np.array(delta, float), eta=eta, smoothing=smoothing)


@pytest.mark.parametrize(
    ("field", "value"),
    [("eta", -1.0), ("smoothing", 2.0), ("metric", "l1"), ("aggregate", "least"), ("layers", "middle")],
)
def test_gate_load_is_checked_when_made(field, value):
    with pytest.raises(ValueError, match="layers" if field == "layers" else field):
        GateLoad(**{field: value})


def test_gate_load_explains_why_two_sources_do_not_do():
    with pytest.raises(ValueError, match="always equally far"):
        GateLoad().propose(np.full(2, 0.5), Signal(counts_DLE=COUNTS_DLE[:2]), {})


def test_gate_load_needs_counts_of_every_source():
    with pytest.raises(ValueError, match="holds none"):
        GateLoad().propose(np.full(3, 1 / 3), Signal(loss_D=np.ones(3)), {})
    with pytest.raises(ValueError, match="3 sources, weights for 4"):
        GateLoad().propose(np.full(4, 0.25), Signal(counts_DLE=COUNTS_DLE), {})


def test_static_strategies_propose_what_they_are_given():
    weights_D = np.array([0.2, 0.3, 0.5])
    assert Fixed().propose(weights_D, Signal(), {}).weights_D.tolist() == [0.2, 0.3, 0.5]
    assert Uniform().propose(np.full(4, 0.25), Signal(), {}).weights_D.tolist() == [0.25] * 4
    with pytest.raises(ValueError, match="use fixed mixing"):
        Uniform().propose(weights_D, Signal(), {})
    assert not Fixed().updates and not Uniform().updates and GateLoad().updates


def test_weights_are_normalised_in_source_order():
    assert normalise_weights([1, 3]).tolist() == [0.25, 0.75]
    assert normalise_weights({"b": 3, "a": 1}, ["a", "b"]).tolist() == [0.25, 0.75]
    assert normalise_weights({"b": 3, "a": 1}).tolist() == [0.75, 0.25]
    assert normalise_weights([0, 2]).tolist() == [0, 1]


@pytest.mark.parametrize(
    "weights",
    [
        [-1, 2],
        [NAN, 1],
        [INF, 1],
        [0, 0],
        [],
        [[1, 2]],
        [1],
        [1, 2, 3],
        [1e308, 1e308],
        {"a": 1},
        {"a": 1, "c": 1},
    ],
)
def test_weights_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        normalise_weights(weights, ["a", "b"])


@pytest.mark.parametrize("weights", [[0.5, 0.5 + 2e-9], [1.5, -0.5], [NAN, 1], [1.0]])
def test_shares_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        check_weights(weights, 2)


def test_entropy_and_kl_by_hand():
    assert entropy(np.array([0.0, 1.0])) == 0
    assert entropy(np.full(4, 0.25)) == pytest.approx(math.log(4), abs=1e-15)
    assert kl_divergence(np.array([0.0, 1.0]), np.array([0.5, 0.5])) == pytest.approx(math.log(2), abs=1e-15)
    assert kl_divergence(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == INF
    with pytest.raises(ValueError, match="equal"):
        kl_divergence(np.ones(1), np.full(2, 0.5))


def test_loads_that_cannot_be_added_are_refused():
    with pytest.raises(ValueError, match="too large"), np.errstate(over="ignore"):
        gate_load(np.full((3, 1, 2), 1e308), "last")


def test_all_layers_and_one_layer_are_read_without_a_copy():
    for layers in ("all", "last", [0], [0, 1]):
        assert np.shares_memory(at_layers(COUNTS_DLE, layers), COUNTS_DLE)
    np.testing.assert_array_equal(at_layers(COUNTS_DLE, [1, 0]), COUNTS_DLE[:, [1, 0]])
