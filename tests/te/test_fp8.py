"""Training in fp8, as far as it goes without its kernels."""

import numpy as np
import pytest

from tests.distributed.layouts import ep
from tests.distributed.ranks import run_ranks
from tests.te import programs

FP8 = ["--bf16", "--fp8", "hybrid", "--fp8-amax-history-len", "4", *ep(1)]


@pytest.mark.parametrize("experts", [[], ["--moe-grouped-gemm"]], ids=["sequential", "grouped"])
def test_a_probe_leaves_scales_as_they_are(experts, run_yaml, plain_start, tmp_path):
    flags = [*plain_start, *FP8, "--fp8-recipe", "delayed", *experts]
    ((fresh, stepped, probed),) = run_ranks(
        1, programs.scales_around_a_probe, run_yaml, flags, tmp_path / "run"
    )
    assert len(stepped) > 8 and all(not history.any() and (scale == 1).all() for history, scale in fresh)
    assert any((scale != 1).any() for _, scale in stepped), "the step scaled nothing"
    for before, after in zip(stepped, probed, strict=True):
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1], before[1])
