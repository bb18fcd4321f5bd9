"""What only a CUDA device can show; one is enough. A part of `make gpu-check`. Axes: E experts, T tokens."""

import numpy as np
import pytest
import torch

from tests.distributed import programs
from tests.distributed.conftest import SMALL, run_yaml  # noqa: F401
from tests.distributed.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FLAGS = [*SMALL, "--expert-model-parallel-size", "1"]


def test_the_platform_patches_nothing_on_cuda(tmp_path):
    import megatron.core.tensor_parallel.mappings as mappings

    before = (torch.zeros, torch.cuda.Stream, torch.Tensor.type, mappings._gather_along_first_dim)
    from megatron_dynmix import platform

    assert platform.start().backend == "nccl"
    assert before == (torch.zeros, torch.cuda.Stream, torch.Tensor.type, mappings._gather_along_first_dim)


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_a_run_on_cuda_learns_and_updates_its_weights(precision, run_yaml, tmp_path):  # noqa: F811
    flags = [*FLAGS, *precision, "--train-iters", "20", "--interval", "5"]
    result = run_ranks(1, programs.train, run_yaml, flags, tmp_path)[0]
    losses = [record["lm_loss"] for record in result["metrics"]]
    assert losses[-1] < losses[0]
    assert len(result["mixing"]) == 4


def test_I6_counts_on_cuda_are_topk_times_the_real_tokens(run_yaml, tmp_path):  # noqa: F811
    result = run_ranks(1, programs.count_one_step, run_yaml, FLAGS, tmp_path)[0]
    assert (2 * result["tokens_D"] == result["step_HDLE"].sum(axis=(0, 3)).T).all()


@pytest.mark.parametrize("by_probability", [False, True])
def test_counting_does_not_wait_for_the_device(by_probability):
    from megatron_dynmix.moe.counter import GateLoadCounter

    cuda = torch.device("cuda")
    counter = GateLoadCounter(2, 1, 4, cuda, trained_only=True, by_probability=by_probability)
    source_T = torch.tensor([0, 1, -1, 1], device=cuda)
    half_T, trained_T = source_T % 2, source_T > 0
    mass_TE = torch.full((4, 4), 0.25, device=cuda) if by_probability else torch.eye(4, device=cuda) > 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        with counter.recording():
            counter.set_sources(source_T, half_T, trained_T)
            counter.add(0, mass_TE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counter.as_signal(counter.take()).sum() == 2


def test_I2_a_run_on_cuda_resumes_where_it_was(run_yaml, tmp_path):  # noqa: F811
    settings = [*FLAGS, "--interval", "3", "--train-iters", "6"]
    whole = run_ranks(1, programs.train, run_yaml, settings, tmp_path / "whole")[0]
    first = [*settings, "--train-iters", "4", "--lr-decay-iters", "6"]
    run_ranks(1, programs.train, run_yaml, first, tmp_path / "parts")
    parts = run_ranks(1, programs.train, run_yaml, settings, tmp_path / "parts", resume="must")[0]
    assert [r["tokens"] for r in parts["metrics"]] == [r["tokens"] for r in whole["metrics"]]
    np.testing.assert_allclose(
        [r["lm_loss"] for r in parts["metrics"]], [r["lm_loss"] for r in whole["metrics"]], rtol=1e-4
    )
