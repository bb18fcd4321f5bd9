"""Gradients that are large are not infinite: they are trained on, and clipped by their true norm."""

import gc
import math
import types

import pytest
import torch

from megatron_dynmix import platform

platform.start()
from megatron.core.optimizer import clip_grads, optimizer  # noqa: E402

from megatron_dynmix.model.optimizer import fuse  # noqa: E402
from megatron_dynmix.platform.megatron_patches import (  # noqa: E402
    measure_gradients_together,
    measure_huge_gradients,
)
from megatron_dynmix.training import trainer  # noqa: E402
from megatron_dynmix.training.step import bad_and_stopping  # noqa: E402

LARGEST = torch.finfo(torch.float32).max


@pytest.fixture
def alone(monkeypatch):
    """Be the only rank; return what was reduced."""
    reduced = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **kwargs: reduced.append(tensor))
    return reduced


def chunk(*gradients, expert=(), kind=torch.float32):
    tensors = [torch.tensor(values, dtype=kind) for values in (*gradients, *expert)]
    buffers = [types.SimpleNamespace(grad_data=tensor) for tensor in tensors]
    return types.SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]),
        buffers=buffers[: len(gradients)],
        expert_parallel_buffers=buffers[len(gradients) :],
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_gradients_whose_sum_overflows_are_finite(alone, kind):
    large = [torch.finfo(kind).max] * 1000
    chunks = [chunk(large, [0.0], kind=kind), chunk([-LARGEST] * 3)]
    assert bad_and_stopping(chunks, stop=False).tolist() == [0, 0]
    assert bad_and_stopping([chunk([1.0], expert=[large], kind=kind)], stop=True).tolist() == [0, 1]
    assert len(alone) == 2, "one transfer each"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_gradient_that_is_not_finite_is_found_anywhere(alone, bad, place):
    values = [1.0, LARGEST, -LARGEST]
    values[place] = bad
    good = [0.0, 1.0]
    for chunks in ([chunk(values)], [chunk(good, values)], [chunk(good), chunk(good, expert=[values])]):
        assert bad_and_stopping(chunks, stop=False).tolist() == [1, 0]
    # infinities that cancel out in a sum do not hide
    assert bad_and_stopping([chunk([math.inf, -math.inf])], stop=False).tolist() == [1, 0]


@pytest.mark.parametrize("scale", [1.0, 1e19, 1e25, 1e37])
def test_the_norm_of_finite_gradients_is_finite_and_that_of_others_megatron_cores(scale, alone, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(size, generator=generator) * scale for size in (3, 1000, 7)]
    stock = optimizer.get_grad_norm_fp32
    monkeypatch.setattr(optimizer, "get_grad_norm_fp32", stock)
    theirs = stock(gradients, grad_stats_parallel_group=None)
    measure_huge_gradients()
    measure_huge_gradients()  # a process may build several optimizers
    ours = optimizer.get_grad_norm_fp32(gradients, grad_stats_parallel_group=None)
    exact = torch.cat(gradients).double().norm().item()
    assert ours == pytest.approx(exact, rel=1e-6)
    assert ours == theirs if scale == 1.0 else math.isinf(theirs), "today's numbers stay"


def test_the_norm_of_all_tensors_together_is_that_of_each_after_the_other(alone, monkeypatch):
    """Megatron-Core's own reads every norm back; on CUDA this one takes its place, and reads none."""
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(size, generator=generator) for size in (3, 1000, 7)]
    before = optimizer.get_grad_norm_fp32(gradients, grad_stats_parallel_group=None)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", clip_grads.l2_norm_impl)
    measure_gradients_together()
    read = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: read.append(tensor))
    ours = optimizer.get_grad_norm_fp32(gradients, grad_stats_parallel_group=None)
    assert ours == pytest.approx(before, rel=1e-6) and not read


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_fused_adam_steps_as_torchs_own_and_counts_on_the_device(kind):
    def trained(fused):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
        adam = kind([weight], lr=0.1, weight_decay=0.01)
        if fused:
            fuse(adam)
        for step in range(3):
            weight.grad = torch.sin(weight.detach() * (step + 2))
            adam.step()
        assert bool(adam.param_groups[0]["fused"]) is fused and float(adam.state[weight]["step"]) == 3
        return weight.detach()

    torch.testing.assert_close(trained(fused=True), trained(fused=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("interval", "collected"), [(2, [2, 4]), (None, [])])
def test_garbage_is_collected_by_hand_at_an_interval_and_never_in_between(interval, collected, monkeypatch):
    nothing = types.SimpleNamespace
    run = nothing(
        progress=nothing(iteration=0),
        run=nothing(platform=nothing(device=torch.device("cpu"))),
        config=nothing(
            training=nothing(manual_gc_interval=interval),
            logging=nothing(log_interval=99),
            checkpoint=nothing(save_interval=None),
        ),
        saving=nothing(settle=lambda wait: None),
        live=nothing(close=lambda: None),
        writer=None,
        **dict.fromkeys(("_log", "save"), lambda *args, **kwargs: None),
        reweight=lambda: None,
    )
    seen, on = [], []

    def train_step(stop):
        run.progress.iteration += 1
        on.append(gc.isenabled())

    run.train_step = train_step
    monkeypatch.setattr(trainer, "any_rank", lambda *args: False)
    monkeypatch.setattr(gc, "collect", lambda: seen.append(run.progress.iteration))
    try:
        trainer.Trainer._train_until(run, 5, nothing(asked=False), nothing())
        assert seen == collected and on == [interval is None] * 5
    finally:
        trainer.Trainer._close(run)
    assert gc.isenabled()
