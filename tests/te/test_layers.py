"""Transformer Engine's layers compute what Megatron-Core's local ones with our attention do, in every layout.

In float32, so that they differ by the order of sums alone; gradients are compared tensor by tensor, to 1e-5
of the largest of each.
"""

import functools

import numpy as np
import pytest

from tests.distributed.conftest import quick_or_slow
from tests.distributed.layouts import CP2, ETP1, PP2, TP2, VPP2, assert_same_gradients, ep, full
from tests.distributed.ranks import run_ranks
from tests.te import programs
from tests.te.conftest import FLAGS, run_plain

MODELS = {
    "base": [],
    "grouped queries": ["--num-query-groups", "2", "--qk-layernorm"],
    "latent attention": [
        *("--multi-latent-attention", "--q-lora-rank", "16", "--kv-lora-rank", "12", "--qk-head-dim", "8"),
        *("--qk-pos-emb-head-dim", "8", "--v-head-dim", "8", "--qk-layernorm"),
        *("--num-query-groups", "4"),
    ],
    "part of each head": ["--rotary-percent", "0.5", "--num-query-groups", "2"],
    "norms of full width": ["--qk-layernorm", "--qk-layernorm-full-width"],
    "biases": ["--add-bias-linear", "--activation", "quick-gelu"],
    "sinks": ["--softmax-type", "learnable"],
    "windows": ["--window-size", "[5, 0]", "--window-attn-skip-freq", "2"],
    "shared experts": ["--moe-shared-expert-intermediate-size", "24"],
    "expert bias": ["--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"],
    "frozen gates": ["--freeze-expert-gate", "--weight-decay", "0"],
    "group limits": ["--moe-router-num-groups", "4", "--moe-router-group-topk", "2"],
    "scales": [
        *("--embedding-multiplier", "2.5", "--residual-multiplier", "0.6", "--logits-scaling", "1.7"),
        *("--softmax-scale", "0.3"),
    ],
}
GROUPED = ["--moe-grouped-gemm"]
FUSED = [*GROUPED, "--moe-router-fusion", "--apply-rope-fusion", "--moe-permute-fusion"]


def selective(modules):
    return ["--recompute-granularity", "selective", "--recompute-modules", modules]


CASES = {
    "as it comes": (1, ep(1), "base"),
    "grouped experts": (1, [*GROUPED, *ep(1)], "base"),
    "all fused, EP2": (2, [*FUSED, *ep(2)], "base"),
    "fused cross entropy": (
        1,
        ["--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te", *ep(1)],
        "base",
    ),
    "fused cross entropy, TP2": (
        2,
        ["--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te", *TP2, *ETP1, *ep(2)],
        "base",
    ),
    "norms and activations again": (1, [*GROUPED, *selective("[layernorm, moe_act]"), *ep(1)], "base"),
    "attention and experts again": (1, [*selective("[core_attn, moe]"), *ep(1)], "base"),
    "all again": (2, [*FUSED, *full("uniform", 1), *ep(2)], "base"),
    "one layer again": (1, [*full("block", 1), *ep(1)], "base"),
    "all fused, TP2 x EP2, norms again": (
        2,
        [*FUSED, *selective("[layernorm, moe_act]"), *TP2, *ETP1, *ep(2)],
        "base",
    ),
    "TP2, ETP2": (2, [*TP2, *ep(1)], "base"),
    "PP2": (2, [*FUSED, *PP2, *ep(1)], "base"),
    "PP2 VPP2 x EP2": (4, [*FUSED, *VPP2, *ep(2)], "base"),
    "PP2 x TP2 x EP2": (4, [*FUSED, *PP2, *TP2, *ETP1, *ep(2)], "base"),
    "CP2": (2, [*CP2, *ep(1)], "base"),
    "CP2 x EP2, all fused": (2, [*FUSED, *CP2, *ep(2)], "base"),
    "overlapped reduction": (2, [*FUSED, *ep(2), "--overlap-grad-reduce"], "base"),
    "allgather": (2, [*FUSED, *ep(2), "--moe-token-dispatcher-type", "allgather"], "base"),
    "grouped queries": (2, [*FUSED, *TP2, *ETP1, *ep(2)], "grouped queries"),
    "latent attention": (1, [*GROUPED, *ep(1)], "latent attention"),
    "latent attention, TP2 x EP2": (2, [*GROUPED, *TP2, *ETP1, *ep(2)], "latent attention"),
    "part of each head, TP2 x EP2": (2, [*GROUPED, *TP2, *ETP1, *ep(2)], "part of each head"),
    "norms of full width, TP2 x EP2": (2, [*GROUPED, *TP2, *ETP1, *ep(2)], "norms of full width"),
    "biases, EP2": (2, [*GROUPED, *ep(2)], "biases"),
    "sinks, TP2 x EP2": (2, [*GROUPED, *TP2, *ETP1, *ep(2)], "sinks"),
    "windows, EP2": (2, [*GROUPED, *ep(2)], "windows"),
    "shared experts": (2, [*FUSED, *TP2, *ETP1, *ep(2)], "shared experts"),
    "overlapped shared experts": (2, [*FUSED, *ep(2), "--moe-shared-expert-overlap"], "shared experts"),
    "expert bias": (2, [*FUSED, *ep(2)], "expert bias"),
    "group limits": (1, [*FUSED, *ep(1)], "group limits"),
    "frozen gates": (1, ep(1), "frozen gates"),
    "scales, TP2 x EP2": (2, [*FUSED, *selective("[layernorm]"), *TP2, *ETP1, *ep(2)], "scales"),
    "frozen gates, grouped, TP2": (2, [*FUSED, *TP2, *ETP1, *ep(2)], "frozen gates"),
}
"""Name -> ranks, flags, model."""
QUICK = {"all fused, TP2 x EP2, norms again"}


@pytest.fixture(scope="module")
def one_rank(run_yaml, tmp_path_factory):
    """Model -> flags that begin with its weights, and a step of one rank without Transformer Engine."""

    @functools.cache
    def run(model):
        folder = tmp_path_factory.mktemp("plain")
        flags = [*FLAGS, *MODELS[model]]
        return run_plain(1, programs.save_and_step, run_yaml, flags, ep(1), folder)[0]

    return run


@pytest.mark.parametrize("case", quick_or_slow(CASES, QUICK))
def test_one_step_is_that_of_the_local_layers(case, run_yaml, one_rank, tmp_path):
    world_size, flags, model = CASES[case]
    start, plain = one_rank(model)
    ranks = run_ranks(world_size, programs.one_step, run_yaml, [*start, *flags], tmp_path / "te")
    assert_same_gradients([engine["gradients"] for engine in ranks], plain["gradients"])
    for engine in ranks:
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} & engine["classes"]
        np.testing.assert_array_equal(engine["step_HDLE"], plain["step_HDLE"])
        assert engine["lm_loss"] == pytest.approx(plain["lm_loss"], rel=2e-6)
        assert engine["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    if "--moe-grouped-gemm" in flags:
        assert all("TEColumnParallelGroupedLinear" in engine["classes"] for engine in ranks)
