"""What counts as a wait for the device, and what as memory: each way by itself, in one process."""

import json
import subprocess
import sys

import pytest

from megatron_dynmix.platform.fake import process

WAITS = {
    "x.item()": 1,
    "x.sum().tolist()": 1,
    "bool(x > 0)": 1,
    "x.cpu()": 1,
    "x.to('cpu', non_blocking=True)": 0,
    "torch.tensor([1.0, 2.0], device='cuda')": 1,
    "torch.full((2,), 1.0, device='cuda')": 0,
    "torch.arange(5, device='cuda')": 0,
    "torch.ones(3).to('cuda', non_blocking=True)": 1,
    "torch.ones(3).pin_memory().to('cuda', non_blocking=True)": 0,
    "torch.ones(3).pin_memory().to('cuda')": 1,
    "torch.ones(3).sum().item()": 0,
    "v.masked_select(v > 0)": 1,
    "v.__setitem__(v > 0, 0.0)": 0,
    "v.__setitem__(v > 0, v)": 1,
    "v.masked_fill(v > 0, 0.0)": 0,
    "v.__setitem__(0, 2.0)": 1,
    "v[0].fill_(2.0)": 0,
    "torch.cuda.synchronize()": 1,
    "torch.cuda.current_stream().record_event().synchronize()": 1,
    "torch.cuda.current_stream().wait_stream(torch.cuda.Stream())": 0,
}
"""What is done with a number x and a vector v on the device -> waits for it."""
PROGRAM = """
import json, sys
from megatron_dynmix.platform.fake import device, observe
device.install(transformer_engine=False, rank=0, world_size=1)
import torch
memory, answers = observe.Memory(), {}
with observe.device_here(), memory:
    x, v = torch.ones((), device="cuda"), torch.ones(8, device="cuda")
    for code in json.loads(sys.argv[1]):
        observe.waits.clear()
        observe.FakeDevice.selected = 4
        eval(code)
        answers[code] = observe.waits.total()
    del x, v
    memory.begin()
    before = memory.now
    a = torch.zeros(1000, device="cuda", requires_grad=True)
    b = a.view(10, 100)
    c = (b * 2).exp()
    c.sum().backward()
    peak, places = memory.peak()
    del a, b, c
    after, kept = memory.now, []
    for kind in (torch.bfloat16, torch.float32):
        like = {"device": "cuda", "dtype": kind, "requires_grad": True}
        q, k = (torch.zeros(1, heads, 512, 64, **like) for heads in (4, 2))
        mask = torch.ones(1, 1, 512, 512, device="cuda", dtype=torch.bool)
        held = memory.now
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
        kept.append(memory.now - held)
print(json.dumps([answers, before, peak, after, kept]))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    if missing := process.what_is_missing(transformer_engine=False):
        pytest.skip(missing)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(list(WAITS))],
        env=process.environment(tmp_path_factory.mktemp("null"), 0, 1),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_wait_is_what_asks_the_device_for_a_value_or_copies_pageable_memory(seen):
    assert seen[0] == WAITS


def test_memory_is_that_of_storages_alive_views_counted_once(seen):
    _, before, peak, after, _ = seen
    assert before == after
    # a; the product, which exp does not keep, and c, which it does; the gradients of c and of the product
    assert 3 * 4000 <= peak - before <= 5 * 4000


def test_torch_chooses_the_kernels_of_a_hopper_gpu(seen):
    """Grouped queries with a mask: a fused kernel in bf16, which keeps no scores; none takes float32."""
    scores = 4 * 512 * 512
    half, full = seen[-1]
    assert half < 2 * scores and full >= 4 * scores
