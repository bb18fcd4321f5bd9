"""Whole runs with Transformer Engine: resumed, gone on with and without it, and with every setting."""

import numpy as np
import pytest

from megatron_dynmix.config.host import NEEDS
from tests.distributed import programs as plain_programs
from tests.distributed.layouts import ETP1, TP2, ep
from tests.distributed.ranks import run_ranks
from tests.te import programs
from tests.te.conftest import FLAGS, run_plain
from tests.te.test_layers import FUSED

pytestmark = pytest.mark.slow
LONG, SHORT = ["--train-iters", "4", "--lr-decay-iters", "4"], ["--train-iters", "2", "--lr-decay-iters", "4"]
LAYOUTS = {
    "1 rank": (1, ep(1)),
    "EP2": (2, [*FUSED, *ep(2)]),
    "TP2 x EP2": (2, [*FUSED, *TP2, *ETP1, *ep(2)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_equals_the_whole_run_digit_for_digit(layout, run_yaml, plain_start, tmp_path):
    world_size, flags = LAYOUTS[layout]
    ranks = run_ranks(
        world_size, programs.whole_and_resumed, run_yaml, [*plain_start, "--bf16", *flags], tmp_path
    )
    for runs in ranks:
        assert runs["first"]["parameters"] != runs["whole"]["parameters"]
        for key in ("blend", "parameters"):
            assert runs["resumed"][key] == runs["whole"][key], key
    runs = ranks[0]
    for key in ("losses", "loads", "weights", "tokens"):
        assert runs["first"][key] + runs["resumed"][key] == runs["whole"][key], key


def _losses(answers):
    return [record["lm_loss"] for record in answers["metrics"]]


def test_checkpoints_go_on_with_and_without_it(run_yaml, plain_start, tmp_path):
    """What was trained half-way with it goes on without, and the other way round, as if nothing changed."""
    flags = [*plain_start, *ep(1)]
    (whole,) = run_plain(1, plain_programs.train, run_yaml, [*flags, *LONG], tmp_path / "whole")
    with_it, without = (
        lambda *args, **options: run_ranks(1, programs.train, *args, **options),
        lambda *args, **options: run_plain(1, plain_programs.train, *args, **options),
    )
    for name, first, then in (("to", with_it, without), ("from", without, with_it)):
        first(run_yaml, [*flags, *SHORT], tmp_path / name)
        (resumed,) = then(run_yaml, [*flags, *LONG], tmp_path / name, resume="must")
        np.testing.assert_allclose(_losses(resumed), _losses(whole), rtol=1e-4)
        for router, weights in whole["routers"].items():
            np.testing.assert_allclose(resumed["routers"][router], weights, rtol=0, atol=1e-4)


GROUPED = ["--moe-grouped-gemm"]
SELECTIVE = ["--recompute-granularity", "selective", *GROUPED]
CURRENT = ["--fp8", "hybrid", "--fp8-recipe", "tensorwise"]
ASKED = {
    "moe_grouped_gemm": GROUPED,
    "recompute_modules": [*SELECTIVE, "--recompute-modules", "[moe_act]"],
    "cross_entropy_fusion_impl": ["--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te"],
    "fp8": ["--fp8", "hybrid"],
    "fp8, current scaling": CURRENT,
    "fp8, current scaling, grouped": [*CURRENT, *GROUPED],
    "moe_permute_fusion": [*GROUPED, "--moe-permute-fusion"],
    "moe_router_fusion": ["--moe-router-fusion"],
    "moe_latent_size": ["--moe-latent-size", "16"],
    "apply_rope_fusion": ["--apply-rope-fusion"],
    "layernorm_zero_centered_gamma": ["--layernorm-zero-centered-gamma"],
    "attention_backend": ["--attention-backend", "fused"],
    "window_size": ["--window-size", "[8, 0]"],
    "window_attn_skip_freq": ["--window-size", "[8, 0]", "--window-attn-skip-freq", "2"],
    "softmax_type": ["--softmax-type", "learnable", "--window-size", "[8, 0]"],
    "attention_dropout": ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"],
}
REFUSED = {
    "moe_token_dispatcher_type": ["--moe-token-dispatcher-type", "flex"],
    "gradient_accumulation_fusion": ["--gradient-accumulation-fusion"],
    "moe_use_legacy_grouped_gemm": ["--moe-use-legacy-grouped-gemm"],
    "attention_backend": ["--attention-backend", "local"],
    "use_te_activation_func": ["--use-te-activation-func"],
    "use_precision_aware_optimizer": ["--use-precision-aware-optimizer"],
}
"""What Megatron-Core, or we, cannot do, or what needs another package."""
UNPROVEN = {
    "fp4": "its recipe has no stand-in",
    "fp8_dot_product_attention": "attention in fp8 has no stand-in",
    "cpu_offloading": "needs streams",
    "fine_grained_activation_offloading": "needs streams",
    "nccl_ub": "needs NCCL",
    "moe_flex_dispatcher_backend": "HybridEP has no stand-in; DeepEP has one in tests/distributed",
}


def test_every_setting_that_needs_it_is_among_these():
    assert {need.setting for need in NEEDS} <= ASKED.keys() | REFUSED.keys() | UNPROVEN.keys()


@pytest.mark.parametrize("name", ASKED)
def test_a_setting_builds_and_steps(name, run_yaml, tmp_path):
    flags = [*FLAGS, "--bf16", *ep(1), *ASKED[name]]
    assert run_ranks(1, programs.refusal, run_yaml, flags, tmp_path) == [None]


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused_by_name(name, run_yaml, tmp_path):
    (why,) = run_ranks(1, programs.refusal, run_yaml, [*FLAGS, "--bf16", *ep(1), *REFUSED[name]], tmp_path)
    assert name in why.replace("-", "_")
