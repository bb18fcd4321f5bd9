"""Rows joined under context parallelism: Transformer Engine's own ring of ranks gives what one rank gives."""

import numpy as np
import pytest

from tests.distributed import programs as plain_programs
from tests.distributed.conftest import quick_or_slow
from tests.distributed.layouts import CP2, ETP1, PP2, TP2, assert_same_gradients, ep
from tests.distributed.ranks import run_ranks
from tests.te import programs
from tests.te.conftest import run_plain

PADDED = ["--segment-multiple", "8"]
LAYOUTS = {
    "CP2": (2, [*CP2, *ep(1)]),
    "CP2 x EP2": (2, [*CP2, *ep(2)]),
    "CP4": (4, ["--context-parallel-size", "4", *ep(2)]),
    "CP2 x TP2": (4, [*CP2, *TP2, *ETP1, *ep(2)]),
    "CP2 x PP2": (4, [*CP2, *PP2, *ep(2)]),
}


class Once:
    """A message of gloo, which waits for ever if it is waited for twice; Transformer Engine does that."""

    def __init__(self, request):
        self.request = request

    def wait(self):
        if self.request is not None:
            self.request.wait()
        self.request = None


def one_step(run_yaml, flags, run_dir):
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    send = context_parallel.flash_attn_p2p_communicate
    context_parallel.flash_attn_p2p_communicate = lambda *args: [Once(request) for request in send(*args)]
    return programs.one_step(run_yaml, flags, run_dir)


@pytest.mark.parametrize("layout", quick_or_slow(LAYOUTS, set()))
def test_one_step_is_that_of_one_rank(layout, run_yaml, plain_start, tmp_path):
    """Of the local layers, with the same padding of segments."""
    world_size, flags = LAYOUTS[layout]
    start = [*plain_start, *PADDED]
    (plain,) = run_plain(1, plain_programs.count_one_step, run_yaml, [*start, *ep(1)], tmp_path / "plain")
    ranks = run_ranks(world_size, one_step, run_yaml, [*start, *flags], tmp_path / "te")
    for engine in ranks:
        np.testing.assert_array_equal(engine["step_HDLE"], plain["step_HDLE"])
        np.testing.assert_array_equal(engine["probe_HDLE"], plain["probe_HDLE"])
        assert engine["lm_loss"] == pytest.approx(plain["lm_loss"], rel=1e-6)
    assert_same_gradients([engine["gradients"] for engine in ranks], plain["gradients"])
