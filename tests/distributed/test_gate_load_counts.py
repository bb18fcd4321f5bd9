"""I6: gate loads are exact in every layout. Axes: D sources, L MoE layers, E experts."""

import numpy as np
import pytest

from tests.distributed import programs
from tests.distributed.ranks import run_ranks

EP1 = ["--expert-model-parallel-size", "1"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
TOPK, LAYERS = 2, 3

LAYOUTS = {
    "EP2": (2, []),
    "EP2 allgather": (2, ["--moe-token-dispatcher-type", "allgather"]),
    "DP2": (2, EP1),
    "EP2 x DP2": (4, []),
    "EP4": (4, ["--expert-model-parallel-size", "4"]),
    "TP2 x EP2": (2, [*TP2, "--expert-tensor-parallel-size", "1"]),
    "TP2 x ETP2": (2, [*TP2, *EP1]),
    "PP2 x TP2 x EP2": (
        4,
        [
            *("--num-layers", "4", "--pipeline-model-parallel-size", "2"),
            *(*TP2, "--expert-tensor-parallel-size", "1"),
        ],
    ),
    "PP2 x EP2": (4, ["--num-layers", "4", "--pipeline-model-parallel-size", "2"]),
    "EP2, full recompute": (
        2,
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    ),
    "EP2, selective recompute": (2, ["--recompute-granularity", "selective", "--recompute-modules", "[moe]"]),
    "EP2, no distributed optimizer": (2, ["--no-use-distributed-optimizer"]),
    "EP2, overlap": (2, ["--overlap-grad-reduce"]),
}


@pytest.fixture(scope="module")
def one_rank(run_yaml, start_from, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-rank")
    return run_ranks(1, programs.count_one_step, run_yaml, [*start_from, *EP1], folder)[0]


def test_I6_one_rank_counts_every_real_token_topk_times(one_rank):
    assert one_rank["step_LDE"].shape == (LAYERS, 4, 8)
    per_layer_LD = one_rank["step_LDE"].sum(axis=2)
    assert (per_layer_LD == TOPK * one_rank["tokens_D"]).all()
    assert (one_rank["probe_LDE"].sum(axis=2) > 0).all()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("PP")])
def test_I6_counts_of_layout_equal_one_rank(layout, one_rank, run_yaml, start_from, tmp_path):
    world_size, flags = LAYOUTS[layout]
    ranks = run_ranks(world_size, programs.count_one_step, run_yaml, [*start_from, *flags], tmp_path)
    for rank in ranks:
        for key in ("step_LDE", "probe_LDE", "tokens_D", "trained_D"):
            assert np.array_equal(rank[key], one_rank[key]), key
        np.testing.assert_allclose(rank["lm_loss"], one_rank["lm_loss"], rtol=1e-5)
        np.testing.assert_allclose(rank["grad_norm"], one_rank["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("PP")])
def test_I6_pipeline_stages_count_their_own_layers(layout, run_yaml, start_from, tmp_path_factory):
    world_size, flags = LAYOUTS[layout]
    begin = start_from[: start_from.index("--pretrained-checkpoint")]
    initial = tmp_path_factory.mktemp("four-layers")
    layers = ["--num-layers", "4"]
    run_ranks(1, programs.save_initial_weights, run_yaml, [*begin, *layers, *EP1], initial)
    begin += ["--pretrained-checkpoint", str(initial / "checkpoints")]
    folder = tmp_path_factory.mktemp("pp")
    one = run_ranks(1, programs.count_one_step, run_yaml, [*begin, *layers, *EP1], folder / "one")[0]
    ranks = run_ranks(world_size, programs.count_one_step, run_yaml, [*begin, *flags], folder / "four")
    for rank in ranks:
        for key in ("step_LDE", "probe_LDE", "tokens_D"):
            assert np.array_equal(rank[key], one[key]), key
        np.testing.assert_allclose(rank["lm_loss"], one["lm_loss"], rtol=1e-5)
