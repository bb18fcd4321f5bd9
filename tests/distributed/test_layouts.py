"""Every layout against one rank; one launch of ranks per layout.

Axes: L MoE layers, H halves, D sources, E experts.

What is compared exactly: two runs of a layout (bits), the order of the rows and the gate loads (integers)
with one rank. Losses are sums in another order, so they agree to a tolerance. Which tokens are dropped by
capacity is decided among the tokens of one rank's micro-batch, so with TP or CP it depends on the layout by
definition, and only choices made before anything was dropped are equal.
"""

import functools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import layouts, programs
from tests.distributed.conftest import SMALL, quick_or_slow
from tests.distributed.layouts import (
    INTERVAL,
    ITERATIONS,
    LAYOUTS,
    SHORT,
    STOP,
    VARIANTS,
    assert_same_gradients,
)
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.newest

TOPK, LAYERS, HALVES, SOURCES, EXPERTS = 2, 4, 2, 4, 8
RTOL = 1e-4
FLAGS = [*SMALL, "--num-layers", str(LAYERS), "--lr", "1e-3", "--probe-tokens", "256"]
DROPS_BY_LAYOUT = {"TP2 x EP2, padded capacity"}
QUICK = {
    *("EP2 x DP2, overlapped gathering", "PP2 VPP2 x EP2"),
    *("PP2 x TP2 x EP2, expert bias", "CP2, expert bias, full recompute"),
}
"""Each kind of parallelism in one layout at least; the others are slow tests."""


@pytest.fixture(scope="module")
def start(run_yaml, tmp_path_factory):
    """Variant of the model -> flags that begin with the same weights in every layout."""

    @functools.cache
    def flags(variant):
        folder = tmp_path_factory.mktemp("initial")
        begin = [*FLAGS, *VARIANTS[variant]]
        run_ranks(1, programs.save_initial_weights, run_yaml, [*begin, *layouts.ep(1)], folder)
        return [*begin, "--pretrained-checkpoint", str(folder / "checkpoints")]

    return flags


@pytest.fixture(scope="module")
def one_rank(run_yaml, start, tmp_path_factory):
    """(variant, signal) -> what one rank sees."""

    @functools.cache
    def run(variant, signal):
        folder = tmp_path_factory.mktemp("one")
        flags = [*start(variant), *layouts.ep(1)]
        return run_ranks(1, layouts.prove, run_yaml, flags, folder, signal)[0]

    return run


@pytest.fixture(scope="module", params=quick_or_slow(LAYOUTS, QUICK))
def layout(request, run_yaml, start, one_rank, tmp_path_factory):
    """One layout's answers, those of one rank, and its name; every second layout reads the other signal."""
    world_size, flags, variant = LAYOUTS[request.param]
    signal = ("train", "probe")[list(LAYOUTS).index(request.param) % 2]
    folder = tmp_path_factory.mktemp("layout")
    ranks = run_ranks(world_size, layouts.prove, run_yaml, [*start(variant), *flags], folder, signal)
    return ranks, one_rank(variant, signal), request.param


RECORDED = ("losses", "source_losses", "aux_losses", "tokens", "rows", "weights", "loads")


def assert_equal(one, other, *keys):
    for key in keys:
        assert one[key] == other[key], key


def test_the_documented_layouts_are_these():
    text = (Path(__file__).parents[2] / "docs/layouts.md").read_text()
    rows = re.findall(r"^\| ([^|`]+) \| (\d+) \| `(.*)` \|$", text, re.MULTILINE)
    real = [
        (name, str(ranks), shlex.join([*flags, *VARIANTS[variant]]))
        for name, (ranks, flags, variant) in LAYOUTS.items()
    ]
    assert rows == real


@pytest.mark.parametrize("signal", ["train", "probe"])
def test_I6_one_rank_counts_every_real_token_topk_times(one_rank, signal):
    runs, counts = one_rank("base", signal)
    assert counts["step_HDLE"].shape == (HALVES, SOURCES, LAYERS, EXPERTS)
    assert (TOPK * counts["tokens_D"] == counts["step_HDLE"].sum(axis=(0, 3)).T).all()
    assert (counts["probe_HDLE"].sum(axis=3) > 0).all()
    assert sum(runs["whole"]["tokens"][0].values()) == counts["tokens_D"].sum()


def test_I1_two_equal_runs_are_equal_bit_for_bit(layout):
    """The run that stops after three iterations is a second one from the start."""
    runs = layout[0][0][0]
    updates = STOP // INTERVAL
    assert len(runs["whole"]["losses"]) == ITERATIONS and len(runs["first"]["losses"]) == STOP
    for key in RECORDED:
        count = STOP if key in RECORDED[:4] else updates
        assert runs["first"][key] == runs["whole"][key][:count] != [], key


def test_I2_a_run_resumed_inside_an_interval_equals_the_whole_run(layout):
    for runs, _ in layout[0]:
        assert runs["first"]["parameters"] != runs["whole"]["parameters"]
        assert_equal(runs["resumed"], runs["whole"], "blend", "parameters")
    runs = layout[0][0][0]
    for key in RECORDED:
        assert runs["first"][key] + runs["resumed"][key] == runs["whole"][key], key


def test_I3_the_order_of_the_rows_is_that_of_one_rank(layout):
    ranks, (one, _), name = layout
    for run in ("off", "train") if name in DROPS_BY_LAYOUT else ("whole", "off", "train"):
        assert_equal(ranks[0][0][run], one[run], "tokens", "rows")
    for runs, _ in ranks:
        assert_equal(runs["train"], one["train"], "blend")


def test_I6_counts_are_those_of_one_rank(layout):
    ranks, (_, one), name = layout
    # layers whose input no dropping has changed
    same = np.s_[:, :, :1] if name in DROPS_BY_LAYOUT else np.s_[:]
    for _, counts in ranks:
        assert counts["step_HDLE"].shape == (HALVES, SOURCES, LAYERS, EXPERTS)
        assert (TOPK * counts["tokens_D"] == counts["step_HDLE"].sum(axis=(0, 3)).T).all()
        for key in ("step_HDLE", "probe_HDLE"):
            assert counts[key][same].any() and np.array_equal(counts[key][same], one[key][same]), key
        for key in ("tokens_D", "trained_D"):
            assert np.array_equal(counts[key], one[key]), key


def test_I7_measuring_changes_nothing(layout):
    for runs, _ in layout[0]:
        for signal in ("probe", "train"):
            assert_equal(runs["off"], runs[signal], "losses", "aux_losses", "tokens", "parameters")
    assert [len(layout[0][0][0][run]["weights"]) for run in ("off", "probe", "train")] == [0, SHORT, SHORT]


def test_I10_losses_and_gradients_are_those_of_one_rank(layout):
    ranks, (one, one_counts), layout_name = layout
    if layout_name in DROPS_BY_LAYOUT:
        pytest.skip("which tokens are dropped depends on the layout")
    for _, counts in ranks:
        np.testing.assert_allclose(counts["lm_loss"], one_counts["lm_loss"], rtol=1e-6)
        np.testing.assert_allclose(counts["grad_norm"], one_counts["grad_norm"], rtol=1e-5)
    assert_same_gradients([counts["gradients"] for _, counts in ranks], one_counts["gradients"])
    mine = ranks[0][0]
    for run in ("whole", "off"):
        np.testing.assert_allclose(mine[run]["losses"], one[run]["losses"], rtol=RTOL)
        for ours, its in zip(mine[run]["aux_losses"], one[run]["aux_losses"], strict=True):
            assert ours.keys() == its.keys() and ours
            for name in ours:
                np.testing.assert_allclose(ours[name], its[name], rtol=RTOL)
    np.testing.assert_allclose(mine["whole"]["weights"], one["whole"]["weights"], atol=1e-4)
