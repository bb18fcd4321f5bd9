"""Which ranks share an expert, as parameters tell it to data parallelism and optimizer."""

import types

import pytest
import torch

from megatron_dynmix import platform

platform.start()
from megatron_dynmix.model.gpt import mark_experts  # noqa: E402


@pytest.mark.parametrize(
    "tensor, expert_tensor, expert, as_dense",
    [
        (1, 1, 1, True),
        (2, 2, 1, True),
        (2, 1, 1, False),
        (1, 2, 1, False),
        (4, 2, 1, False),
        (2, 2, 2, False),
    ],
)
def test_experts_are_reduced_over_their_own_ranks_where_their_layout_differs(
    tensor, expert_tensor, expert, as_dense
):
    linear, shared, router = (torch.nn.Linear(2, 2) for _ in range(3))
    parts = {"experts": {"linear_fc1": linear}, "shared_experts": {"linear_fc1": shared}}
    mlp = torch.nn.ModuleDict({name: torch.nn.ModuleDict(part) for name, part in parts.items()})
    mlp["router"] = router
    layout = types.SimpleNamespace(
        tensor_model_parallel_size=tensor,
        expert_tensor_parallel_size=expert_tensor,
        expert_model_parallel_size=expert,
    )
    mark_experts(torch.nn.ModuleDict({"mlp": mlp}), layout)
    assert linear.weight.allreduce is as_dense and linear.weight.tensor_model_parallel
    assert not any(vars(parameter) for module in (shared, router) for parameter in module.parameters())
