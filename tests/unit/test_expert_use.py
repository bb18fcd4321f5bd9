"""How evenly experts are used, and how differently by the sources. Axes: D sources, L layers, E experts."""

import numpy as np
import pytest
import torch

from megatron_dynmix.mixing.expert_use import expert_use
from megatron_dynmix.mixing.gate_loads import gate_load, l2_distance, source_delta

COUNTS_DLE = np.random.default_rng(0).integers(1, 1000, (4, 3, 8))
WEIGHTS_D = np.array([0.4, 0.3, 0.2, 0.1])


def test_the_mix_is_weighted_as_it_is_drawn():
    counts_DLE = np.array([[[10, 0]], [[0, 300]], [[5, 5]], [[1, 1]]])
    use = expert_use(counts_DLE, np.array([0.5, 0.1, 0.2, 0.2]))
    assert use.busiest == pytest.approx([1.4])
    assert use.cv_squared == pytest.approx([2 * 0.2**2 / 0.5**2])


def test_cv_squared_is_the_balance_loss_of_the_official_model():
    """Which takes torch's variance, of a sample."""
    load_LE = torch.tensor(gate_load(COUNTS_DLE, "all", by_layer=True)).permute(1, 2, 0) @ torch.tensor(
        WEIGHTS_D
    )
    assert expert_use(COUNTS_DLE, WEIGHTS_D).cv_squared == pytest.approx(
        [float(load_E.var() / load_E.mean() ** 2) for load_E in load_LE]
    )
    assert expert_use(np.full((4, 3, 8), 7), WEIGHTS_D).cv_squared == pytest.approx([0, 0, 0])


def test_specialization_is_the_mean_of_the_papers_scores():
    expected = []
    for layer in range(3):
        delta_D = source_delta(l2_distance(gate_load(COUNTS_DLE, [layer])), "mean")
        expected.append(delta_D.mean() * 4 / 3)  # which are divided by D, with nothing for the source itself
    assert expert_use(COUNTS_DLE, WEIGHTS_D).specialization == pytest.approx(expected)
    alike = expert_use(np.repeat(COUNTS_DLE[:1], 4, axis=0), WEIGHTS_D)
    assert alike.specialization == [0, 0, 0]
    own = np.eye(4, dtype=np.int64)[:, None] * 50
    assert expert_use(own, WEIGHTS_D).specialization == pytest.approx([np.sqrt(2)])


def test_what_was_not_measured_is_left_out():
    assert expert_use(0 * COUNTS_DLE, WEIGHTS_D) is None
    some = COUNTS_DLE * np.array([1, 0, 1, 0])[:, None, None]
    without = expert_use(COUNTS_DLE[::2], WEIGHTS_D[::2])
    assert expert_use(some, WEIGHTS_D).specialization == without.specialization
    assert expert_use(some, WEIGHTS_D).cv_squared == pytest.approx(without.cv_squared)
    one = expert_use(COUNTS_DLE * np.array([1, 0, 0, 0])[:, None, None], WEIGHTS_D)
    assert one.specialization is None and len(one.busiest) == 3
    lone = expert_use(np.ones((2, 1, 1)), WEIGHTS_D[:2])
    assert (lone.busiest, lone.cv_squared, lone.specialization) == ([1], [0], [0])
