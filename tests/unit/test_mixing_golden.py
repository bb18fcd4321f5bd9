"""I8: the update rule against numbers printed by the official implementation of Zhu et al. (2025)."""

import numpy as np
import pytest

from megatron_dynmix.mixing.strategies.gate_load import GateLoad, Inverse
from megatron_dynmix.mixing.strategy import Signal

COUNTS_DLE = np.array(
    [
        [[20, 15, 14, 13, 12, 10, 9, 7]],
        [[10, 22, 8, 16, 12, 12, 10, 10]],
        [[13, 13, 12, 13, 12, 13, 12, 12]],
        [[14, 12, 13, 12, 13, 12, 12, 12]],
    ]
)
UNIFORM_D = np.full(4, 0.25)
L2_DELTA = [0.084239559, 0.0961045814, 0.0589625462, 0.0615180174]
L2_WEIGHTS = [0.2693003759, 0.3016510626, 0.211943085, 0.2171054765]


def assert_golden(actual, expected):
    # The vectors have ten digits: half a unit of the last one is well inside 1e-9.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("metric", "delta", "weights"),
    [
        ("l2", L2_DELTA, L2_WEIGHTS),
        (
            "cos",
            [0.0361905666, 0.0456106462, 0.0213243181, 0.0239618726],
            [0.259539766, 0.2839424415, 0.225413682, 0.2311041105],
        ),
    ],
)
def test_I8_mean(metric, delta, weights):
    proposal = GateLoad(metric=metric).propose(UNIFORM_D, Signal(counts_DLE=COUNTS_DLE), {})
    assert_golden(proposal.delta_D, delta)
    assert_golden(proposal.weights_D, weights)


def test_I8_l2_max():
    proposal = GateLoad(aggregate="max").propose(UNIFORM_D, Signal(counts_DLE=COUNTS_DLE), {})
    assert_golden(proposal.weights_D, [0.2780621807, 0.2780621807, 0.2036734972, 0.2402021415])


def test_I8_l2_min_includes_the_source_itself_and_moves_nothing():
    proposal = GateLoad(aggregate="min").propose(UNIFORM_D, Signal(counts_DLE=COUNTS_DLE), {})
    assert proposal.delta_D.tolist() == [0, 0, 0, 0]
    assert proposal.weights_D.tolist() == UNIFORM_D.tolist()


@pytest.mark.parametrize("number", [3, 4, 9, 40])
@pytest.mark.parametrize("layers", [1, 3])
def test_I8_cos_min_is_one_minus_the_least_similarity(number, layers):
    """As the official code has it, written here from similarities; ours is made of distances."""
    counts_DLE = np.random.default_rng(number).integers(1, 1000, (number, layers, 8))
    load_DV = counts_DLE.reshape(number, -1) / counts_DLE.sum(axis=(1, 2))[:, None]
    length_D = np.sqrt((load_DV**2).sum(axis=1))
    delta_D = 1 - (load_DV @ load_DV.T / np.outer(length_D, length_D)).min(axis=1)
    even_D = np.full(number, 1 / number)
    proposal = GateLoad(metric="cos", aggregate="min", layers="all").propose(
        even_D, Signal(counts_DLE=counts_DLE), {}
    )
    assert_golden(proposal.delta_D, delta_D)
    alpha_D = np.exp(10 * delta_D) / np.exp(10 * delta_D).sum()
    assert_golden(proposal.weights_D, 0.95 * alpha_D + 0.05 / number)


def test_I8_inverse_swaps_deltas_by_rank():
    proposal = Inverse().propose(UNIFORM_D, Signal(counts_DLE=COUNTS_DLE), {})
    assert_golden(proposal.delta_D, [0.0615180174, 0.0589625462, 0.0961045814, 0.084239559])
    assert_golden(proposal.weights_D, [0.2171054765, 0.211943085, 0.3016510626, 0.2693003759])


@pytest.mark.parametrize(
    ("smoothing", "num_updates", "weights"),
    [
        (0.05, 20, [0.1496365182, 0.7673584267, 0.0401898535, 0.0428152016]),
        (0.8, 10, [0.2547518824, 0.2638513495, 0.2400726059, 0.2413241622]),
    ],
)
def test_I8_repeated_updates(smoothing, num_updates, weights):
    strategy, weights_D = GateLoad(smoothing=smoothing), UNIFORM_D
    for _ in range(num_updates):
        weights_D = strategy.propose(weights_D, Signal(counts_DLE=COUNTS_DLE), {}).weights_D
    assert_golden(weights_D, weights)
