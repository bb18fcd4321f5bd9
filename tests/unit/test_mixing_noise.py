"""Noise of gate loads: what the halves tell of it, against simulated counts whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmix.mixing.gate_loads import (
    AGGREGATES,
    DISTANCES,
    delta_shares,
    gap_scale,
    gate_load,
    gradient,
    l2_distance,
    source_delta,
)
from megatron_dynmix.mixing.strategies import gate_load as noise_module
from megatron_dynmix.mixing.strategies.gate_load import (
    GateLoad,
    Inverse,
    Noise,
    debiased_l2,
    delta_error,
    measure_noise,
    shrink_gaps,
)
from megatron_dynmix.mixing.strategy import Signal, SourceError

checked = settings(max_examples=30, derandomize=True)
REPEATS = 300
EVEN_D = np.full(4, 0.25)


def truth(rng, shape=(4, 1, 8), concentration=6.0):
    """True loads of sources clearly apart."""
    return rng.dirichlet(np.full(shape[2], concentration), size=shape[:2])


def measured(rng, truth_DLE, tokens_D, concentration=None, rows=100):
    """Counts in two halves of independent rows; finite concentration: tokens of one row are alike."""
    halves = np.zeros((2, *truth_DLE.shape), np.int64)
    for d, load_LE in enumerate(truth_DLE):
        for k, load_E in enumerate(load_LE):
            if concentration is None:
                half = np.array([tokens_D[d] - tokens_D[d] // 3, tokens_D[d] // 3])
                halves[:, d, k] = rng.multinomial(half, load_E)
            else:
                loads_RE = rng.dirichlet(concentration * load_E, size=rows)
                counts_RE = rng.multinomial(tokens_D[d] // rows, loads_RE)
                halves[:, d, k] = counts_RE[0::2].sum(axis=0), counts_RE[1::2].sum(axis=0)
    return halves


def noise_of(halves):
    load_DLE = halves.sum(axis=0) / halves.sum(axis=(0, 3))[..., None] / halves.shape[2]
    first_DLE = halves[0] / halves[0].sum(axis=2, keepdims=True) / halves.shape[2]
    share_D = halves[0].sum(axis=(1, 2)) / halves.sum(axis=(0, 2, 3))
    return load_DLE, measure_noise(load_DLE, first_DLE, share_D)


def propose(strategy, halves):
    signal = Signal(counts_DLE=halves.sum(axis=0), half_counts_HDLE=halves)
    return strategy.propose(np.full(halves.shape[1], 1 / halves.shape[1]), signal, {})


@pytest.mark.parametrize("concentration", [None, 20.0], ids=["independent", "rows-alike"])
def test_energy_is_the_mean_squared_error_within_10_percent(concentration):
    rng = np.random.default_rng(1)
    truth_DLE = truth(rng)
    tokens_D = np.array([1000, 3000, 9000, 27000])
    errors, energies, sizes = [], [], []
    for _ in range(REPEATS):
        load_DLE, noise = noise_of(measured(rng, truth_DLE, tokens_D, concentration))
        errors.append(((load_DLE - truth_DLE) ** 2).sum(axis=(1, 2)))
        energies.append(noise.energy_D)
        sizes.append(noise.size_D)
    np.testing.assert_allclose(np.mean(energies, axis=0), np.mean(errors, axis=0), rtol=0.1)
    if concentration is None:
        np.testing.assert_allclose(np.mean(sizes, axis=0) * tokens_D, 1, rtol=0.1)
    else:
        # a design effect of (tokens + concentration) / (1 + concentration) per row of so many tokens
        design_D = (tokens_D / 100 + concentration) / (1 + concentration)
        np.testing.assert_allclose(np.mean(sizes, axis=0) * tokens_D, design_D, rtol=0.1)


@pytest.mark.parametrize("metric", sorted(DISTANCES))
@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("concentration", [None, 20.0], ids=["independent", "rows-alike"])
def test_errors_of_deltas_are_calibrated_within_30_percent(metric, aggregate, concentration):
    rng = np.random.default_rng(2)
    truth_DLE = truth(rng)
    strategy = GateLoad(metric=metric, aggregate=aggregate)
    tokens_D = np.array([2000, 4000, 8000, 16000])
    deltas, errors = [], []
    for _ in range(REPEATS // 2):
        proposal = propose(strategy, measured(rng, truth_DLE, tokens_D, concentration, rows=40))
        deltas.append(proposal.delta_D)
        errors.append(proposal.delta_error_D)
    told_D = np.sqrt(np.mean(np.square(errors), axis=0))
    np.testing.assert_allclose(told_D, np.std(deltas, axis=0), rtol=0.3)


def test_errors_with_several_layers_are_calibrated_or_careful():
    rng = np.random.default_rng(3)
    truth_DLE = truth(rng, (4, 3, 8))
    tokens_D = np.array([2000, 4000, 8000, 16000])
    for layer_mix, lowest, highest in (("concat", 0.75, 1.25), ("mean", 1.0, 2.2)):
        strategy = GateLoad(layers="all", layer_mix=layer_mix)
        proposals = [propose(strategy, measured(rng, truth_DLE, tokens_D)) for _ in range(REPEATS // 2)]
        told_D = np.mean([proposal.delta_error_D for proposal in proposals], axis=0)
        ratio_D = told_D / np.std([proposal.delta_D for proposal in proposals], axis=0)
        assert (ratio_D > lowest).all() and (ratio_D < highest).all(), ratio_D


def test_debiasing_takes_off_what_noise_adds_to_squared_distances():
    rng = np.random.default_rng(4)
    truth_DLE = truth(rng)
    truth_DLE[1] = 0.9 * truth_DLE[0] + 0.1 * truth_DLE[2]
    true_DD = l2_distance(truth_DLE[:, 0]) ** 2
    plain, debiased = [], []
    for _ in range(REPEATS):
        load_DLE, noise = noise_of(measured(rng, truth_DLE, np.array([500, 500, 4000, 4000])))
        distance_DD = l2_distance(load_DLE[:, 0])
        plain.append(distance_DD**2)
        debiased.append(distance_DD**2 - noise.energy_D[:, None] - noise.energy_D)
        np.testing.assert_allclose(
            debiased_l2(distance_DD, noise) ** 2,
            np.where(np.eye(4, dtype=bool), 0, np.maximum(debiased[-1], 0)),
            atol=1e-15,
        )
    apart = ~np.eye(4, dtype=bool)
    bias_DD = np.mean(plain, axis=0) - true_DD
    left_DD = np.mean(debiased, axis=0) - true_DD
    error_DD = np.std(debiased, axis=0) / np.sqrt(REPEATS)
    assert bias_DD[0, 1] > 0.5 * true_DD[0, 1] and bias_DD[0, 1] > 10 * error_DD[0, 1]
    assert (np.abs(left_DD[apart]) < 3 * error_DD[apart]).all()


@checked
@given(st.integers(0, 10**6))
def test_debiased_squares_are_products_of_independent_differences_for_equal_halves(seed):
    rng = np.random.default_rng(seed)
    a_DE, b_DE = rng.dirichlet(np.ones(6), size=(2, 3))
    load_DLE = ((a_DE + b_DE) / 2)[:, None]
    noise = measure_noise(load_DLE, a_DE[:, None], np.full(3, 0.5))
    debiased_DD = debiased_l2(l2_distance(load_DLE[:, 0]), noise)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        first = (a_DE[i] - a_DE[j]) @ (b_DE[i] - b_DE[j])
        second = (a_DE[i] - b_DE[j]) @ (b_DE[i] - a_DE[j])
        assert debiased_DD[i, j] ** 2 == pytest.approx(max((first + second) / 2, 0), abs=1e-12)


@checked
@given(st.integers(0, 10**6), st.sampled_from(sorted(DISTANCES)))
def test_gradients_are_those_of_the_distances(seed, metric):
    rng = np.random.default_rng(seed)
    load_DE = rng.dirichlet(np.ones(5), size=4)
    step_E = rng.normal(size=5)
    step_E -= step_E.mean()
    gradient_DE = gradient(metric, load_DE, 0)
    width = 1e-7 * load_DE[0].min()
    ends = []
    for sign in (-1, 1):
        moved_DE = load_DE.copy()
        moved_DE[0] += sign * width * step_E
        ends.append(DISTANCES[metric](moved_DE)[0])
    slope_D = (ends[1] - ends[0]) / (2 * width)
    np.testing.assert_allclose(gradient_DE[1:] @ step_E, slope_D[1:], rtol=1e-3, atol=1e-4)
    assert (gradient_DE[0] == 0).all() or metric in ("cos",)


@checked
@given(st.integers(0, 10**6), st.sampled_from(list(AGGREGATES)), st.sampled_from(["l2", "scaled-l2"]))
def test_the_fast_errors_of_l2_equal_those_by_gradients(seed, aggregate, metric):
    rng = np.random.default_rng(seed)
    load_DLE = rng.dirichlet(np.ones(7), size=(5, 3)) / 3
    distance_DD = DISTANCES[metric](load_DLE.reshape(5, -1))
    share_DD = delta_shares(distance_DD, aggregate)
    noise = Noise(energy_D=np.ones(5), size_D=rng.random(5))
    fast_D = delta_error(load_DLE, noise, metric, distance_DD, share_DD)
    np.fill_diagonal(share_DD, 0.0)
    own_D, pair_DD = noise_module._variances(load_DLE, share_DD, metric)
    plain_D = np.sqrt(noise.size_D * own_D + (share_DD**2 * pair_DD.T) @ noise.size_D)
    np.testing.assert_allclose(fast_D, plain_D, rtol=1e-9, atol=1e-15)


@checked
@given(st.integers(0, 10**6), st.sampled_from(list(AGGREGATES)))
def test_deltas_are_the_shares_of_the_distances(seed, aggregate):
    distance_DD = l2_distance(np.random.default_rng(seed).dirichlet(np.ones(4), size=5))
    expected_D = (delta_shares(distance_DD, aggregate) * distance_DD).sum(axis=1)
    np.testing.assert_allclose(source_delta(distance_DD, aggregate), expected_D, atol=1e-15)


def test_gaps_within_the_noise_do_not_move_weights():
    rng = np.random.default_rng(5)
    same_DLE = np.repeat(truth(rng, (1, 1, 8)), 4, axis=0)
    apart_DLE = truth(rng)
    tokens_D = np.array([300, 3000, 3000, 3000])
    published, careful = [], []
    for _ in range(50):
        halves = measured(rng, same_DLE, tokens_D)
        published.append(np.abs(propose(GateLoad(smoothing=0), halves).weights_D - 0.25).max())
        careful.append(np.abs(propose(GateLoad(smoothing=0, min_gap=2), halves).weights_D - 0.25).max())
    assert np.mean(careful) < 0.2 * np.mean(published)
    halves = measured(rng, apart_DLE, 100 * tokens_D)
    kept_D = propose(GateLoad(min_gap=2), halves).weights_D
    np.testing.assert_allclose(kept_D, propose(GateLoad(), halves).weights_D, atol=0.01)


def test_shrinking_is_by_hand_and_0_changes_no_bit():
    delta_D = np.array([0.1, 0.2, 0.6])
    error_D = np.array([0.1, 0.2, 0.05])
    np.testing.assert_allclose(shrink_gaps(delta_D, error_D, 1.0), [0.2, 0.3, 0.55], atol=1e-15)
    assert shrink_gaps(delta_D, error_D, 0.0) is delta_D


@checked
@given(st.integers(0, 10**6), st.sampled_from([0.5, 2.0, 20.0]))
def test_normalised_one_eta_serves_all_numbers_of_experts_and_sources(seed, concentration):
    """The size of a step, in nats of weight ratio, over 8 to 256 experts and 3 to 64 sources."""
    rng = np.random.default_rng(seed)
    steps, plain = [], []
    for sources in (3, 16, 64):
        for experts in (8, 64, 256):
            counts_DLE = rng.multinomial(10**7, rng.dirichlet(np.full(experts, concentration), size=sources))
            weights_D = np.full(sources, 1 / sources)
            for normalise, sizes in (("scale", steps), ("none", plain)):
                strategy = GateLoad(normalise=normalise, smoothing=0)
                proposal = strategy.propose(weights_D, Signal(counts_DLE=counts_DLE[:, None]), {})
                sizes.append(np.std(np.log(proposal.weights_D)))
    assert max(steps) / min(steps) < 1.01
    assert max(plain) / min(plain) > 5
    assert np.mean(steps) == pytest.approx(10 / 64, rel=0.01)


def test_normalising_leaves_equal_scores_alone():
    assert gap_scale(np.full(3, 0.1)) == 1
    assert gap_scale(np.array([0.1, 0.1 + 1e-16, 0.1])) == 1
    assert gap_scale(np.zeros(3)) == 1


def test_normalising_leaves_the_published_geometry_about_as_it_is():
    counts_DLE = np.array(
        [
            [[20, 15, 14, 13, 12, 10, 9, 7]],
            [[10, 22, 8, 16, 12, 12, 10, 10]],
            [[13, 13, 12, 13, 12, 13, 12, 12]],
            [[14, 12, 13, 12, 13, 12, 12, 12]],
        ]
    )
    delta_D = GateLoad().propose(EVEN_D, Signal(counts_DLE=counts_DLE), {}).delta_D
    assert gap_scale(delta_D) == pytest.approx(1, abs=0.05)


def test_scaled_l2_depends_on_relative_loads_only():
    rng = np.random.default_rng(6)
    load_DE = rng.dirichlet(np.ones(8), size=3)
    np.testing.assert_allclose(DISTANCES["scaled-l2"](load_DE), DISTANCES["l2"](load_DE), rtol=1e-15)
    # Every expert split into four equal ones: the same relative deviations, four times the experts.
    split_DE = np.repeat(load_DE / 4, 4, axis=1)
    np.testing.assert_allclose(DISTANCES["scaled-l2"](split_DE), DISTANCES["l2"](load_DE), rtol=1e-12)


@pytest.mark.parametrize(
    ("metric", "disjoint", "half"),
    [
        # KL([1, 0] || [.75, .25]) = log 4/3, KL([.5, .5] || [.75, .25]) = log(2/3) / 2 + log(2) / 2
        ("js", np.sqrt(np.log(2)), np.sqrt((np.log(4 / 3) + (np.log(2 / 3) + np.log(2)) / 2) / 2)),
        ("hellinger", 1, np.sqrt(1 - np.sqrt(0.5))),
        ("tv", 1, 0.5),
    ],
)
def test_distances_of_shares_by_hand(metric, disjoint, half):
    assert DISTANCES[metric](np.array([[1.0, 0], [0, 1]]))[0, 1] == pytest.approx(disjoint, abs=1e-15)
    assert DISTANCES[metric](np.array([[1.0, 0], [0.5, 0.5]]))[0, 1] == pytest.approx(half, abs=1e-15)


@checked
@given(st.integers(0, 10**6), st.floats(1e-9, 1))
def test_close_loads_keep_their_digits(seed, closeness):
    rng = np.random.default_rng(seed)
    load_DE = rng.dirichlet(np.ones(6), size=5)
    load_DE[1] = load_DE[0] + closeness * (load_DE[2] - load_DE[0])
    plain_DD = np.stack([np.linalg.norm(load_DE - load_E, axis=1) for load_E in load_DE])
    np.testing.assert_allclose(l2_distance(load_DE), plain_DD, rtol=1e-12, atol=0)
    # Along a line away from the first load the Jensen-Shannon distance grows in proportion, while close.
    js = DISTANCES["js"](load_DE)[0, 1]
    assert js > 0
    assert (DISTANCES["js"](load_DE[[0, 0]]) == 0).all()


def test_mean_over_layers_is_the_mean_of_the_layers_distances():
    rng = np.random.default_rng(7)
    counts_DLE = rng.integers(1, 1000, size=(4, 3, 8))
    signal = Signal(counts_DLE=counts_DLE)
    mean = GateLoad(layers=[0, 2], layer_mix="mean").propose(EVEN_D, signal, {})
    each = [GateLoad(layers=[layer]).propose(EVEN_D, signal, {}).distance_DD for layer in (0, 2)]
    np.testing.assert_allclose(mean.distance_DD, np.mean(each, axis=0), rtol=1e-14)
    np.testing.assert_allclose(mean.load_DLE.sum(axis=2), 1, rtol=1e-14)
    one = GateLoad(layer_mix="mean").propose(EVEN_D, signal, {})
    assert one.weights_D.tobytes() == GateLoad().propose(EVEN_D, signal, {}).weights_D.tobytes()


def test_halves_in_the_signal_change_nothing_that_was_not_asked_for():
    halves = measured(np.random.default_rng(8), truth(np.random.default_rng(8)), np.full(4, 900))
    with_halves = propose(GateLoad(), halves)
    without = GateLoad().propose(EVEN_D, Signal(counts_DLE=halves.sum(axis=0)), {})
    assert with_halves.weights_D.tobytes() == without.weights_D.tobytes()
    assert without.delta_error_D is None and (with_halves.delta_error_D > 0).all()


@pytest.mark.parametrize("options", [{"min_gap": 2.0}, {"debias": True}])
def test_missing_or_empty_halves_are_refused_where_they_are_needed(options):
    halves = measured(np.random.default_rng(9), truth(np.random.default_rng(9)), np.full(4, 900))
    strategy = GateLoad(**options)
    assert strategy.needs_halves and not GateLoad().needs_halves
    with pytest.raises(ValueError, match="two halves"):
        strategy.propose(EVEN_D, Signal(counts_DLE=halves.sum(axis=0)), {})
    halves[1, 2] = 0
    with pytest.raises(SourceError, match="both halves") as refused:
        propose(strategy, halves)
    assert refused.value.dataset_ids == (2,)
    assert propose(GateLoad(), halves).delta_error_D is None


def test_inverse_shares_ties_and_keeps_the_sizes_of_the_steps():
    rng = np.random.default_rng(10)
    halves = measured(rng, truth(rng), np.full(4, 900))
    halves[:, 3] = halves[:, 0]
    plain, inverse = propose(GateLoad(), halves), propose(Inverse(), halves)
    assert inverse.delta_D[3] == inverse.delta_D[0]
    assert inverse.delta_D.sum() == pytest.approx(plain.delta_D.sum(), abs=1e-15)
    assert inverse.delta_D.argmax() == plain.delta_D.argmin()


def test_loads_divided_by_layer_need_tokens_in_every_layer():
    counts_DLE = np.array([[[1, 3], [9, 9]], [[1, 1], [0, 0]]])
    assert gate_load(counts_DLE, "all").shape == (2, 2, 2)
    with pytest.raises(ValueError, match=r"source 1 .*no routed tokens"):
        gate_load(counts_DLE, "all", by_layer=True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"layer_mix": "sum"}, "layer_mix 'sum'"),
        ({"normalise": "rms"}, "normalise 'rms'"),
        ({"debias": True, "metric": "js"}, "debias works on l2"),
        ({"min_gap": -1.0}, "min_gap"),
        ({"min_gap": float("nan")}, "min_gap"),
    ],
)
def test_options_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        GateLoad(**options)
