"""Entropy and divergence of weights."""

import math

import numpy as np
import pytest

from megatron_dynmix.mixing.weights import entropy, kl_divergence


@pytest.mark.parametrize(
    ("new", "old", "entropy_nats", "kl_nats"),
    [
        ([0.5, 0.5], [0.5, 0.5], math.log(2), 0.0),
        ([1.0, 0.0], [0.5, 0.5], 0.0, math.log(2)),
        ([0.25, 0.75], [0.5, 0.5], 0.5623351446, 0.1308120360),
        ([0.5, 0.5], [1.0, 0.0], math.log(2), math.inf),
    ],
)
def test_entropy_and_kl_divergence_in_nats(new, old, entropy_nats, kl_nats):
    assert entropy(np.array(new)) == pytest.approx(entropy_nats, abs=1e-9)
    assert kl_divergence(np.array(new), np.array(old)) == pytest.approx(kl_nats, abs=1e-9)
