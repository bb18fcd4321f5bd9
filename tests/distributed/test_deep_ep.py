"""The flex dispatcher with DeepEP, by a stand-in: what it sends comes to the same as alltoall."""

import numpy as np
import pytest

from tests.distributed import deep_ep, programs
from tests.distributed.layouts import ETP1, TP2, ep, full
from tests.distributed.ranks import run_ranks

FLEX = ["--moe-token-dispatcher-type", "flex", "--moe-router-dtype", "fp32"]
ALLTOALL = ["--moe-token-dispatcher-type", "alltoall", "--moe-router-dtype", "fp32"]
LAYOUTS = {
    "EP2": ep(2),
    "TP2 x EP2, ETP1": [*TP2, *ETP1, *ep(2)],
    "TP2, ETP2": [*TP2, *ep(1)],
    "EP2, capacity": [*ep(2), "--moe-expert-capacity-factor", "1.0"],
    "EP2, full recompute": [*ep(2), *full("uniform", 1)],
}
slow = pytest.mark.slow


def with_deep_ep(program, *args):
    """A program in a rank that has DeepEP."""
    deep_ep.install()
    answer = program(*args)
    assert deep_ep.Buffer.sms == 20, "Megatron-Core has asked for it"
    return answer


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=slow if name != "EP2" else ()) for name in LAYOUTS]
)
def test_a_step_counts_and_learns_what_alltoall_does(layout, run_yaml, start_from, tmp_path):
    flags = [*start_from, *LAYOUTS[layout]]
    plain = run_ranks(2, programs.count_one_step, run_yaml, [*flags, *ALLTOALL], tmp_path / "a")
    flex = run_ranks(2, with_deep_ep, programs.count_one_step, run_yaml, [*flags, *FLEX], tmp_path / "f")
    for there, here in zip(plain, flex, strict=True):
        for counted in ("step_HDLE", "probe_HDLE", "tokens_D", "trained_D"):
            np.testing.assert_array_equal(here[counted], there[counted])
        np.testing.assert_allclose(here["loss_sum_D"], there["loss_sum_D"], rtol=1e-6)
        np.testing.assert_allclose(here["grad_norm"], there["grad_norm"], rtol=1e-5)
        for (name, *_, one), (other_name, *_, other) in zip(
            here["gradients"], there["gradients"], strict=True
        ):
            assert name == other_name
            np.testing.assert_allclose(
                one, other, rtol=0, atol=1e-6 * max(np.abs(other).max(), 1), err_msg=name
            )


@slow
def test_a_run_changes_its_weights_as_with_alltoall(run_yaml, start_from, tmp_path):
    flags = [*start_from, *ep(2)]
    plain, *_ = run_ranks(2, programs.train, run_yaml, [*flags, *ALLTOALL], tmp_path / "a")
    flex, *_ = run_ranks(2, with_deep_ep, programs.train, run_yaml, [*flags, *FLEX], tmp_path / "f")
    losses = ([record["lm_loss"] for record in run["metrics"]] for run in (flex, plain))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert [update["counts"] for update in flex["mixing"]] == [update["counts"] for update in plain["mixing"]]
