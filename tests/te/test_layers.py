"""Transformer Engine's layers compute what Megatron-Core's local ones with our attention do.

In float32, so that they differ by the order of sums alone.
"""

import numpy as np
import pytest

from tests.distributed import programs as plain_programs
from tests.distributed.layouts import assert_same_gradients, ep
from tests.distributed.ranks import run_ranks
from tests.te import programs
from tests.te.conftest import run_plain

MODELS = {"base": []}


@pytest.mark.parametrize("model", MODELS)
def test_one_step_is_that_of_the_local_layers(model, run_yaml, plain_start, tmp_path):
    flags = [*plain_start, *MODELS[model], *ep(1)]
    (plain,) = run_plain(1, plain_programs.count_one_step, run_yaml, flags, tmp_path / "plain")
    (engine,) = run_ranks(1, programs.one_step, run_yaml, flags, tmp_path / "te")
    np.testing.assert_array_equal(engine["step_HDLE"], plain["step_HDLE"])
    assert engine["lm_loss"] == pytest.approx(plain["lm_loss"], rel=1e-6)
    assert_same_gradients([engine["gradients"]], plain["gradients"])
