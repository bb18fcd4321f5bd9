"""Where a device has a generator of its own, what is drawn on the CPU follows `--seed` all the same.

Megatron-Core makes routers on the CPU and seeds the device: on a GPU that is another generator.
"""

import random
import types

import numpy as np
import pytest
import torch

from megatron_dynmix import platform

platform.start()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dynmix.moe.mlp_router import MlpRouter  # noqa: E402
from megatron_dynmix.training.trainer import seed_iteration  # noqa: E402


@pytest.fixture
def rank(monkeypatch):
    """Be a rank on a GPU: return what sets its stage, tensor- and expert-parallel rank."""
    device = torch.Generator()
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: device.manual_seed(seed))
    for owner, name in ((torch.cuda, "get_rng_state"), (megatron_random, "_get_cuda_rng_state")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: device.get_state())
    monkeypatch.setattr(
        megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: device.set_state(state)
    )
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def be(stage=0, tensor=0, expert=0):
        for name, value in (
            ("get_pipeline_model_parallel_rank", stage),
            ("get_tensor_model_parallel_rank", tensor),
            ("get_expert_model_parallel_rank", expert),
            ("get_expert_tensor_parallel_rank", tensor),
        ):
            for owner in (parallel_state, megatron_random):
                monkeypatch.setattr(owner, name, lambda value=value: value, raising=False)

    yield be
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


def first_weights(seed):
    """Return the weights of two routers, and of what else may draw, as a rank begins with them."""
    torch.manual_seed(99)  # whatever came before
    seed_iteration(seed, -1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=1,
        num_moe_experts=8,
        add_bias_linear=False,
        moe_token_dispatcher_type="alltoall",
    )
    groups = types.SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
    routers = [MlpRouter(config, pg_collection=groups, noise=None) for _ in range(2)]
    drawn = [parameter.detach() for router in routers for parameter in router.parameters()]
    return torch.cat([*map(torch.flatten, drawn), torch.tensor([np.random.rand(), random.random()])])


def test_routers_follow_the_seed_and_differ_between_stages(rank):
    rank()
    first, again, other = (first_weights(seed) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not (first == other).any()
    rank(stage=1)
    assert not (first == first_weights(5)).any(), "stages do not repeat one stream"
    half = 2 * 8 * 16
    assert not torch.equal(first[:half], first[half : 2 * half])


@pytest.mark.parametrize("others", [{"tensor": 1}, {"expert": 3}, {"tensor": 2, "expert": 1}])
def test_routers_are_the_same_on_all_ranks_that_hold_them(others, rank):
    rank(stage=2)
    first = first_weights(5)
    rank(stage=2, **others)
    assert torch.equal(first, first_weights(5))
