"""Strategies against the numbers of the official implementations, and against slow oracles."""

import numpy as np
import pytest
from strategy_fixtures import uniform

from megatron_dynmix.mixing.strategies.ado import Ado
from megatron_dynmix.mixing.strategies.gate_load import (
    Balanced,
    GateLoad,
)
from megatron_dynmix.mixing.strategies.losses import LossSoftmax, OnlineDataMixing, RefLoss, Sheared
from megatron_dynmix.mixing.strategies.planned import (
    DataSize,
    FinalStatic,
    Random,
    RandomBatch,
    Schedule,
    SentenceEmbedding,
    Sequential,
    Temperature,
    UniMax,
)
from megatron_dynmix.mixing.strategy import BeginningWith, Signal
from megatron_dynmix.mixing.weights import balancing_weights

COUNTS_DLE = np.array(
    [
        [[20, 15, 14, 13, 12, 10, 9, 7]],
        [[10, 22, 8, 16, 12, 12, 10, 10]],
        [[13, 13, 12, 13, 12, 13, 12, 12]],
        [[14, 12, 13, 12, 13, 12, 12, 12]],
    ]
)


def assert_golden(actual, expected, digits=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=digits)


def weights(strategy, signal, before_D=None, num_sources=4):
    return strategy.propose(uniform(num_sources) if before_D is None else before_D, signal, {}).weights_D


def test_data_size_gives_the_papers_shares():
    # The original sizes of OpenOrca, Math-Instruct, Code Instructions and ShareGPT.
    size_D = np.array([2_891_080, 262_039, 121_959, 58_735])
    assert_golden(
        weights(DataSize(), Signal(size_D=size_D)), [0.86719935, 0.07860043, 0.03658232, 0.01761791], 1e-6
    )


@pytest.mark.parametrize("scale", [1, 1e-9, 1e301])
def test_given_sizes_take_the_place_of_the_rows(scale):
    """The paper's releases hold 20,000 examples each; its weights follow the originals."""
    sizes_D, even = np.array([2_891_080, 262_039, 121_959, 58_735]), Signal(size_D=np.full(4, 20_000))
    given = weights(DataSize(sizes_D=(scale * sizes_D).tolist()), even)
    assert_golden(given, [0.86719935, 0.07860043, 0.03658232, 0.01761791], 1e-6)
    levelled = weights(Temperature(temperature=2, sizes_D=(scale * sizes_D).tolist()), even)
    assert_golden(levelled, np.sqrt(sizes_D) / np.sqrt(sizes_D).sum())
    assert_golden(given, weights(DataSize(), Signal(size_D=sizes_D)))


def test_temperature_one_is_the_size_and_a_high_one_nearly_uniform():
    signal = Signal(size_D=np.array([1000, 10, 1, 100]))
    assert_golden(weights(Temperature(temperature=1), signal), weights(DataSize(), signal))
    assert_golden(weights(Temperature(temperature=1e9), signal), uniform(4), 1e-8)
    assert_golden(
        weights(Temperature(temperature=2), signal),
        np.sqrt([1000, 10, 1, 100]) / np.sqrt([1000, 10, 1, 100]).sum(),
    )


def test_the_default_temperature_is_the_exponent_of_mt5():
    size_D = np.array([1000, 10, 1, 100])
    assert_golden(weights(Temperature(), Signal(size_D=size_D)), size_D**0.3 / (size_D**0.3).sum())


def test_a_tiny_temperature_does_not_overflow():
    assert weights(Temperature(temperature=1e-3), Signal(size_D=np.array([5, 10**9, 10**9, 7]))).tolist() == [
        *(0, 0.5, 0.5, 0)
    ]


def test_unimax_by_hand():
    signal = Signal(size_D=np.array([10_000, 100, 1000]), run_rows=6000)
    assert_golden(weights(UniMax(epoch_cap=4), signal, num_sources=3), [7 / 15, 1 / 15, 7 / 15], 1e-15)


@pytest.mark.parametrize("seed", range(20))
def test_unimax_is_water_filling(seed):
    """Every source gets the same level or its cap, whichever is less, and all together the run's rows."""
    rng = np.random.default_rng(seed)
    size_D = rng.integers(1, 10**5, 8)
    cap_D = 3.0 * size_D
    run_rows = int(rng.uniform(0.05, 0.99) * cap_D.sum())
    low, high = 0.0, float(cap_D.max())
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(level, cap_D).sum() < run_rows else (low, level)
    expected_D = np.minimum(high, cap_D) / np.minimum(high, cap_D).sum()
    strategy = UniMax(epoch_cap=3)
    assert_golden(
        weights(strategy, Signal(size_D=size_D, run_rows=run_rows), num_sources=8), expected_D, 1e-12
    )


def test_final_static_takes_the_final_weights_of_the_paper():
    strategy = FinalStatic(weights_D=(28.507, 32.023, 21.495, 17.976))
    assert_golden(weights(strategy, Signal()), np.array([28.507, 32.023, 21.495, 17.976]) / 100.001)


def test_dynamic_sent_emb_goes_on_from_the_embeddings_weights_by_gate_loads():
    """As the official run: its first weights are those of sent-emb, its updates those of gate-load."""
    vectors_DV = np.random.default_rng(0).normal(scale=0.05, size=(4, 16))
    both = BeginningWith(GateLoad(), SentenceEmbedding(embeddings_DV=vectors_DV.tolist()))
    first_D = weights(both, Signal())
    distance_DD = np.linalg.norm(vectors_DV[:, None] - vectors_DV, axis=2)
    alpha_D = np.exp(10 * distance_DD.mean(axis=1))
    assert_golden(first_D, 0.95 * alpha_D / alpha_D.sum() + 0.05 / 4)
    load_DE = COUNTS_DLE[:, 0] / COUNTS_DLE[:, 0].sum(axis=1, keepdims=True)
    delta_D = np.linalg.norm(load_DE[:, None] - load_DE, axis=2).mean(axis=1)
    alpha_D = first_D * np.exp(10 * delta_D)
    second_D = weights(both, Signal(counts_DLE=COUNTS_DLE, iteration=100), first_D)
    assert_golden(second_D, 0.95 * alpha_D / alpha_D.sum() + 0.05 / 4)
    assert both.starts and both.updates and both.needs_gate_load and both.layers == "last"


@pytest.mark.parametrize(("iteration", "due"), [(0, 0), (400, 0), (500, 1), (999, 1), (1500, 3), (2000, 0)])
def test_sequential_goes_round_every_500_iterations(iteration, due):
    expected_D = np.full(4, 1e-5)
    expected_D[due] = 1
    assert_golden(weights(Sequential(), Signal(iteration=iteration)), expected_D / 1.00003, 1e-15)


def test_sequential_rolls_as_the_official_code_does():
    official_D = np.array([1.0, 1e-5, 1e-5, 1e-5]) / 1.00003
    for iteration in range(500, 4000, 500):
        official_D = np.roll(official_D, 1)
        assert_golden(
            weights(Sequential(), Signal(iteration=iteration)), official_D / official_D.sum(), 1e-15
        )


def test_random_weights_are_normalised_uniform_numbers_of_seed_and_iteration():
    draws_ND = np.array([weights(Random(), Signal(seed=1, iteration=i)) for i in range(2000)])
    other_D = weights(Random(), Signal(seed=2, iteration=5))
    assert_golden(weights(Random(), Signal(seed=1, iteration=5)), draws_ND[5], 0)
    assert not np.allclose(other_D, draws_ND[5])
    # Not uniform on the simplex, where the mean square of a share of four would be 0.1.
    numbers_ND = np.random.default_rng(0).random((20_000, 4))
    expected = ((numbers_ND / numbers_ND.sum(axis=1, keepdims=True)) ** 2).mean()
    assert_golden(draws_ND.mean(axis=0), uniform(4), 0.01)
    assert abs((draws_ND**2).mean() - expected) < 0.002 < abs(0.1 - expected)


def test_random_batch_chooses_every_source_about_as_often():
    draws_ND = np.array([weights(RandomBatch(), Signal(seed=1, iteration=i)) for i in range(2000)])
    assert_golden(np.sort(draws_ND), np.tile(np.array([1e-5, 1e-5, 1e-5, 1]) / 1.00003, (2000, 1)), 1e-15)
    assert (np.abs(np.bincount(draws_ND.argmax(axis=1)) - 500) < 100).all()


@pytest.mark.parametrize(
    ("interpolation", "at_100", "at_150", "at_300"),
    [
        ("steps", [0.5, 0.5], [0.5, 0.5], [0.9, 0.1]),
        ("linear", [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]),
        (
            "cosine",
            [0.7, 0.3],
            [0.5 + 0.4 * (1 + np.sqrt(0.5)) / 2, 0.5 - 0.4 * (1 + np.sqrt(0.5)) / 2],
            [0.9, 0.1],
        ),
    ],
)
def test_schedule_between_and_after_its_points(interpolation, at_100, at_150, at_300):
    strategy = Schedule(points=[[0, [1, 1]], [200, [9, 1]]], interpolation=interpolation)
    expected = {0: [0.5, 0.5], 100: at_100, 150: at_150, 200: [0.9, 0.1], 300: at_300}
    for iteration, expected_D in expected.items():
        assert_golden(weights(strategy, Signal(iteration=iteration), num_sources=2), expected_D, 1e-15)


LOSS_D = np.array([1.2, 2.0, 0.7, 0.9])
TARGET_D = (1.0, 1.5, 0.9, 0.9)
BEFORE_D = np.array([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("strategy", [Sheared(target_D=TARGET_D), RefLoss(reference_D=TARGET_D)])
def test_excess_loss_as_sheared_llamas_code(strategy):
    expected = [0.3917989895, 0.3966546778, 0.1313319793, 0.0802143534]
    assert_golden(weights(strategy, Signal(loss_D=LOSS_D), BEFORE_D), expected)


@pytest.mark.parametrize(
    "strategy", [Sheared(target_D=TARGET_D, clip=True), RefLoss(reference_D=TARGET_D, clip=True)]
)
def test_clipped_excess_loss_as_sheared_llamas_paper(strategy):
    expected = [0.3807301270, 0.3854486265, 0.1558724977, 0.0779487488]
    assert_golden(weights(strategy, Signal(loss_D=LOSS_D), BEFORE_D), expected)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (
            "exp3",
            [
                [0.2645644247, 0.2545326137, 0.2449900598, 0.2359129018],
                [0.2567451690, 0.2521332519, 0.2479392226, 0.2431823565],
                [0.2572552246, 0.2518087772, 0.2477237878, 0.2432122105],
                [0.2577536901, 0.2520926978, 0.2475356311, 0.2426179810],
            ],
        ),
        (
            "smoothed",
            [
                [0.4067676519, 0.2698807895, 0.1868547105, 0.1364968481],
                [0.4156073166, 0.2684578156, 0.1864611984, 0.1294736694],
                [0.4200602915, 0.2606852950, 0.1860014183, 0.1332529953],
                [0.4162634501, 0.2640892346, 0.1867695091, 0.1328778062],
            ],
        ),
    ],
)
def test_odm_follows_the_authors_arithmetic(variant, expected):
    losses = [[2.0, 1.5, 1.0, 0.5], [1.9, 1.4, 1.0, 0.5], [1.8, 1.2, 0.9, 0.6], [1.6, 1.2, 0.8, 0.4]]
    strategy, weights_D, state = OnlineDataMixing(variant=variant, warmup=0), uniform(4), {}
    for update, (loss, expected_D) in enumerate(zip(losses, expected, strict=True), start=1):
        proposal = strategy.propose(weights_D, Signal(loss_D=np.array(loss), iteration=100 * update), state)
        weights_D, state = proposal.weights_D, proposal.state
        assert_golden(weights_D, expected_D)


def test_loss_softmax():
    expected_D = np.exp(LOSS_D / 0.5) / np.exp(LOSS_D / 0.5).sum()
    assert_golden(weights(LossSoftmax(temperature=0.5), Signal(loss_D=LOSS_D)), expected_D, 1e-15)


def test_sentence_embeddings_in_place_of_loads_give_algorithm_1():
    vectors = (COUNTS_DLE[:, 0] / 100).tolist()
    for metric in ("l2", "cos"):
        expected = GateLoad(metric=metric).propose(uniform(4), Signal(counts_DLE=COUNTS_DLE), {})
        strategy = SentenceEmbedding(embeddings_DV=vectors, metric=metric)
        assert_golden(weights(strategy, Signal()), expected.weights_D, 1e-12)
    expected = [0.2693003759, 0.3016510626, 0.211943085, 0.2171054765]
    assert_golden(weights(SentenceEmbedding(embeddings_DV=vectors), Signal()), expected)


@pytest.mark.parametrize("seed", range(20))
def test_balancing_weights_beat_every_other_mix(seed):
    """The optimality conditions of min |D w|^2 on the simplex, and a search that must not do better."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(3 + seed % 6, 5)) * rng.uniform(0.1, 3, (3 + seed % 6, 1))
    distance_DD = np.linalg.norm(points[:, None] - points[None], axis=-1)
    weights_D = balancing_weights(distance_DD)
    gradient_D = distance_DD @ distance_DD @ weights_D
    value = weights_D @ gradient_D
    assert_golden(gradient_D[weights_D > 0] / value, 1, 1e-6)
    assert (gradient_D >= value * (1 - 1e-6)).all()
    others_ND = rng.dirichlet(np.full(len(points), 0.5), 5000)
    assert ((others_ND @ distance_DD) ** 2).sum(axis=1).min() >= value * (1 - 1e-9)


def test_balanced_is_even_for_equally_distant_and_for_equal_sources():
    assert_golden(balancing_weights(1 - np.eye(5)), uniform(5), 1e-12)
    assert balancing_weights(np.zeros((3, 3))).tolist() == uniform(3).tolist()
    twins_DLE = COUNTS_DLE[[0, 1, 2, 1]]
    weights_D = weights(Balanced(), Signal(counts_DLE=twins_DLE))
    assert abs(weights_D[1] - weights_D[3]) < 1e-6


def test_ado_as_published_from_known_laws():
    """Losses on exact power laws: the fit finds them, and the rest is the authors' arithmetic."""
    law = np.array([[1.0, 0.1, 0.3], [0.5, -0.2, 0.02], [0.2, 0.0, 0.5]])
    size_D = np.array([700_000, 299_000, 1000])
    strategy, weights_D, state, drawn_D = Ado(warmup=0), np.array([0.7, 0.299, 0.001]), {}, np.zeros(3, int)
    for iteration in range(100, 1300, 100):
        drawn_D = drawn_D + np.array([640, 384, 256])
        n = float(drawn_D.sum())
        loss_D = np.exp(law[:, 1]) + np.exp(law[:, 0]) * n ** -law[:, 2]
        signal = Signal(loss_D=loss_D, iteration=iteration, train_iters=2000, size_D=size_D, drawn_D=drawn_D)
        before, proposal = state, strategy.propose(weights_D, signal, state)
        weights_D, state = proposal.weights_D, proposal.state
    # The middle law is nearly flat in the exponent's range; the outer two are pinned down.
    slope_D = np.maximum(law[:, 2], 0.05) * (loss_D - np.exp(law[:, 1])) / n
    np.testing.assert_allclose(proposal.delta_D[[0, 2]], slope_D[[0, 2]], rtol=0.1)
    rho_D = size_D / 1e6 * np.sqrt(state["credit"]) * proposal.delta_D
    rho_D = np.maximum(rho_D / rho_D.sum(), 0.01)
    rho_D /= rho_D.sum()
    assert_golden(weights_D, 0.9 * np.array(before["average"]) + 0.1 * rho_D, 1e-12)
    assert_golden(state["average"], np.array(before["average"]) * 12 / 13 + rho_D / 13, 1e-12)
    assert_golden(state["credit"], 0.9 * np.array(before["credit"]) + 0.1 * np.array([0.5, 0.3, 0.2]), 1e-12)
