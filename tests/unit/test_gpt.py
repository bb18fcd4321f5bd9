"""Which ranks share an expert, as parameters tell it to data parallelism and optimizer."""

import types

import pytest
import torch

from megatron_dynmix import platform

platform.start()
from megatron_dynmix.model.gpt import mark_experts, scales_kept  # noqa: E402


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


def test_what_is_only_measured_leaves_scales_as_they_were():
    def state():
        return types.SimpleNamespace(amax_history=torch.zeros(4, 2), scale=torch.ones(2))

    old, new, layer = state(), state(), torch.nn.Linear(1, 1)
    old.amax_history[1], old.scale[0] = 3.0, 0.5
    before = old.amax_history.clone(), old.scale.clone()
    layer.fp8_meta = {"scaling_fwd": old, "recipe": object()}
    with scales_kept([torch.nn.Sequential(layer)]):
        layer.fp8_meta["scaling_bwd"] = new
        for each in (old, new):
            each.amax_history[0], each.scale[1] = 9.0, 0.1
    assert torch.equal(old.amax_history, before[0]) and torch.equal(old.scale, before[1])
    assert not new.amax_history.any() and bool((new.scale == 1).all())
