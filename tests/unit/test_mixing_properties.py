"""What must hold for any loads and weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_dynmix.mixing.gate_loads import AGGREGATES, DISTANCES
from megatron_dynmix.mixing.strategies.gate_load import GateLoad, Inverse
from megatron_dynmix.mixing.strategy import Signal
from megatron_dynmix.mixing.weights import entropy, kl_divergence, normalise_weights, reweight

# Fixed examples and no deadline: a busy machine must not turn a property red.
checked = settings(max_examples=60, derandomize=True)

num_sources = st.integers(3, 9)
rules = st.builds(
    GateLoad,
    eta=st.floats(0, 100),
    smoothing=st.floats(0, 1),
    metric=st.sampled_from(sorted(DISTANCES)),
    aggregate=st.sampled_from(list(AGGREGATES)),
    layers=st.sampled_from(["last", "all"]),
    layer_mix=st.sampled_from(["concat", "mean"]),
)


@st.composite
def mixes(draw):
    """Weights and counts of the same sources; every row has tokens in every layer."""
    shape = (draw(num_sources), draw(st.integers(1, 3)), draw(st.integers(2, 8)))
    counts_DLE = draw(arrays(np.int64, shape, elements=st.integers(0, 10**6)))
    counts_DLE[:, :, 0] += 1
    weights_D = draw(arrays(np.float64, shape[0], elements=st.floats(0.001, 1)))
    return normalise_weights(weights_D), counts_DLE


def new_weights(rule, weights_D, counts_DLE):
    return rule.propose(weights_D, Signal(counts_DLE=counts_DLE), {}).weights_D


@checked
@given(rules, mixes())
def test_result_is_on_the_simplex_and_above_the_floor(rule, mix):
    weights_D = new_weights(rule, *mix)
    assert abs(weights_D.sum() - 1) <= 1e-12
    assert (weights_D >= rule.smoothing / len(weights_D) - 1e-15).all()


@checked
@given(rules, mixes(), st.randoms(use_true_random=False))
def test_permuting_sources_permutes_the_result(rule, mix, random):
    weights_D, counts_DLE = mix
    order = list(range(len(weights_D)))
    random.shuffle(order)
    permuted = new_weights(rule, weights_D[order], counts_DLE[order])
    np.testing.assert_allclose(permuted, new_weights(rule, *mix)[order], rtol=0, atol=1e-12)


@checked
@given(rules, mixes(), st.integers(1, 1000))
def test_scaling_the_counts_of_a_source_changes_nothing(rule, mix, factor):
    weights_D, counts_DLE = mix
    scaled_DLE = counts_DLE.copy()
    scaled_DLE[1] *= factor
    np.testing.assert_array_equal(new_weights(rule, weights_D, scaled_DLE), new_weights(rule, *mix))


@checked
@given(rules, mixes())
def test_from_equal_weights_the_more_distant_source_never_ends_lower(rule, mix):
    _, counts_DLE = mix
    equal_D = np.full(len(counts_DLE), 1 / len(counts_DLE))
    proposal = rule.propose(equal_D, Signal(counts_DLE=counts_DLE), {})
    assert (np.diff(proposal.weights_D[np.argsort(proposal.delta_D)]) >= 0).all()


@checked
@given(rules, mixes())
def test_duplicate_sources_get_equal_weights(rule, mix):
    weights_D, counts_DLE = mix
    counts_DLE[2], weights_D[2] = counts_DLE[0], weights_D[0]
    weights_D = new_weights(rule, normalise_weights(weights_D), counts_DLE)
    assert abs(weights_D[2] - weights_D[0]) <= 1e-12


@pytest.mark.parametrize("metric", sorted(DISTANCES))
@pytest.mark.parametrize("rule", [GateLoad, Inverse])
def test_copies_get_equal_weights_among_many_sources(rule, metric):
    """From nine sources on, sums run in another order for each source, and copies differ in the last bit."""
    rng = np.random.default_rng(5)
    for number in (9, 12, 17, 33, 64) * 3:
        counts_DLE = rng.integers(1, 5000, (number, 2, 8))
        copies = rng.permutation(number)[:4]
        counts_DLE[copies] = counts_DLE[copies[0]]
        for options in ({}, {"layers": "all", "layer_mix": "mean"}, {"normalise": "scale"}, {"eta": 1000}):
            weights_D = new_weights(rule(metric=metric, **options), np.full(number, 1 / number), counts_DLE)
            assert np.ptp(weights_D[copies]) <= 1e-12, (number, options)


@checked
@given(mixes())
def test_without_step_and_smoothing_weights_stay(mix):
    weights_D, counts_DLE = mix
    np.testing.assert_allclose(
        new_weights(GateLoad(eta=0, smoothing=0), weights_D, counts_DLE), weights_D, rtol=0, atol=1e-15
    )


@checked
@given(mixes(), st.floats(0, 1))
def test_without_step_equal_weights_stay_exactly_equal(mix, smoothing):
    _, counts_DLE = mix
    equal_D = np.full(len(counts_DLE), 1 / len(counts_DLE))
    weights_D = new_weights(GateLoad(eta=0, smoothing=smoothing), equal_D, counts_DLE)
    assert len(set(weights_D.tolist())) == 1


@checked
@given(rules, mixes())
def test_update_is_deterministic_and_leaves_its_input_alone(rule, mix):
    weights_D, counts_DLE = mix
    before = weights_D.copy(), counts_DLE.copy()
    np.testing.assert_array_equal(new_weights(rule, *mix), new_weights(rule, *mix))
    np.testing.assert_array_equal(weights_D, before[0])
    np.testing.assert_array_equal(counts_DLE, before[1])


@checked
@given(mixes(), st.floats(0, 1000), st.integers(0, 2))
def test_a_paused_source_stays_paused_until_smoothed(mix, eta, paused):
    weights_D, counts_DLE = mix
    weights_D[paused] = 0
    weights_D = normalise_weights(weights_D)
    assert new_weights(GateLoad(eta=eta, smoothing=0), weights_D, counts_DLE)[paused] == 0
    smoothed_D = new_weights(GateLoad(eta=eta, smoothing=0.3), weights_D, counts_DLE)
    assert abs(smoothed_D[paused] - 0.3 / len(weights_D)) <= 1e-15


@checked
@given(mixes())
def test_distances_are_symmetric_with_an_exact_zero_diagonal(mix):
    load_DE = mix[1].reshape(len(mix[1]), -1).astype(float)
    for distance in DISTANCES.values():
        distance_DD = distance(load_DE)
        np.testing.assert_array_equal(distance_DD, distance_DD.T)
        assert (distance_DD.diagonal() == 0).all()


@checked
@given(mixes(), mixes())
def test_entropy_and_kl_keep_their_bounds(mix, other):
    weights_D = mix[0]
    assert 0 <= entropy(weights_D) <= np.log(len(weights_D)) + 1e-12
    assert kl_divergence(weights_D, weights_D) == 0
    if len(other[0]) == len(weights_D):
        assert kl_divergence(other[0], weights_D) >= 0


def test_a_huge_score_of_a_paused_source_does_not_drown_the_others():
    weights_D = reweight(np.array([0.0, 0.5, 0.5]), np.array([1e6, 0.0, 0.0]), eta=10, smoothing=0)
    assert weights_D.tolist() == [0, 0.5, 0.5]


def test_huge_scores_neither_overflow_nor_lose_the_closest_ratio():
    weights_D = reweight(np.full(3, 1 / 3), np.array([1e4, 1e4, -1e4]), eta=1e3, smoothing=0)
    assert weights_D.tolist() == [0.5, 0.5, 0]
