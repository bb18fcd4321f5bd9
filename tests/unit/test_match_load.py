"""The mix whose load is that of a target set."""

import numpy as np
import pytest

from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.strategies.match_load import MatchLoad
from megatron_dynmix.mixing.strategy import Signal
from megatron_dynmix.training.mix_setup import resolve_files


def weights(target, counts_DLE=None, before_D=None, **options):
    number = len(before_D if counts_DLE is None else counts_DLE)
    before_D = np.full(number, 1 / number) if before_D is None else before_D
    strategy = MatchLoad(target_source=target, **options)
    return strategy.propose(before_D, Signal(counts_DLE=counts_DLE), {}).weights_D


def problem(rng, number, layers, experts, target):
    """Loads of sources, the target's a mix of the others, and that mix."""
    load_DLE = rng.dirichlet(np.full(experts, 6.0), size=(number, layers))
    mix_D = rng.dirichlet(np.ones(number))
    mix_D[rng.integers(number)] = 0
    mix_D[target] = 0
    mix_D /= mix_D.sum()
    load_DLE[target] = np.einsum("d,dle->le", mix_D, load_DLE)
    return load_DLE, mix_D


@pytest.mark.parametrize(("number", "layers", "experts"), [(3, 1, 8), (5, 1, 8), (8, 4, 64), (40, 2, 256)])
@pytest.mark.parametrize("seed", range(3))
def test_a_known_mix_is_found_again(number, layers, experts, seed):
    rng = np.random.default_rng(seed)
    target = int(rng.integers(number))
    load_DLE, mix_D = problem(rng, number, layers, experts, target)
    found_D = weights(target, load_DLE)
    assert found_D[target] == 0 and abs(found_D.sum() - 1) <= 1e-12
    np.testing.assert_allclose(found_D, mix_D, rtol=0, atol=1e-4)  # the ridge pulls to even weights


@pytest.mark.parametrize("tokens", [10_000, 1_000_000])
def test_from_counts_it_is_found_to_their_noise(tokens):
    """Errors of a least-squares solution from loads with the noise of so many tokens."""
    rng = np.random.default_rng(1)
    load_DLE, mix_D = problem(rng, 5, 2, 16, target=2)
    counts_DLE = np.array([[rng.multinomial(tokens, load_E) for load_E in load_LE] for load_LE in load_DLE])
    gap_VD = (load_DLE - load_DLE[2])[[0, 1, 3, 4]].reshape(4, -1).T
    least = np.linalg.svd(gap_VD - gap_VD.mean(axis=1, keepdims=True), compute_uv=False)[-2]
    error = np.linalg.norm(weights(2, counts_DLE) - mix_D)
    assert error <= 3 * np.sqrt(2 * 2 / tokens) / least


def test_no_mix_is_nearer():
    rng = np.random.default_rng(4)
    load_DLE = rng.dirichlet(np.full(8, 1.0), size=(6, 1))
    load_DV = load_DLE.reshape(6, -1)
    found_D = weights(0, load_DLE)
    nearest = np.linalg.norm(found_D @ load_DV - load_DV[0])
    for other_D in rng.dirichlet(np.full(5, 0.5), size=2000):
        assert np.linalg.norm(other_D @ load_DV[1:] - load_DV[0]) >= nearest - 1e-9


def test_copies_share_evenly_and_a_copy_of_the_target_gets_all():
    load_DLE = np.random.default_rng(0).dirichlet(np.ones(8), size=(4, 1))
    load_DLE[3] = load_DLE[1]
    found_D = weights(0, load_DLE)
    assert abs(found_D[1] - found_D[3]) <= 1e-6
    load_DLE[2] = load_DLE[0]
    np.testing.assert_allclose(weights(0, load_DLE), [0, 0, 1, 0], atol=1e-6)


def test_the_target_is_not_drawn_from_the_start_on():
    assert weights(1, before_D=np.array([0.2, 0.5, 0.3])).tolist() == pytest.approx([0.4, 0, 0.6])
    assert weights(1, before_D=np.array([0.0, 1.0, 0.0])).tolist() == [0.5, 0, 0.5]


def test_the_setting_names_a_source():
    def resolved(name):
        return resolve_files(MixingConfig(strategy="match-load", match=name), ["chat", "law/2", "code"])

    assert resolved("law/2") == {"target_source": 1}
    with pytest.raises(InputError, match=r"mixing\.match is law, which is none of chat, law/2, code"):
        resolved("law")


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="source 3 for its target and 3 sources"):
        weights(3, before_D=np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="one to draw from"):
        weights(0, before_D=np.ones(1))
    with pytest.raises(ValueError, match="target_source -1"):
        MatchLoad(target_source=-1)
    with pytest.raises(ValueError, match="counts for 2 sources, weights for 3"):
        weights(0, np.ones((2, 1, 4)), np.full(3, 1 / 3))
