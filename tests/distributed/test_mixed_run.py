"""`MixedRun` in a loop that is nobody's: the run is our own trainer's, in any layout, whatever happens."""

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_dynmix.verify.verify import verify
from tests.distributed import loop_programs
from tests.distributed.conftest import SMALL, quick_or_slow
from tests.distributed.layouts import CP2, ETP1, PP2, TP2, VPP2, ep, full
from tests.distributed.ranks import run_ranks
from tests.docs_blocks import ROOT, blocks_of

FLAGS = [*SMALL, "--signal", "train", "--moe-aux-loss-coeff", "0"]
LAYOUTS = {
    "one rank": (1, ep(1)),
    "EP2": (2, ep(2)),
    "PP2 x EP2, full recompute": (4, [*PP2, *ep(2), "--num-layers", "4", *full("uniform", 1)]),
    "VPP2": (2, [*VPP2, *ep(1), "--num-layers", "4"]),
    "TP2 x EP2, ETP1": (2, [*TP2, *ETP1, *ep(2)]),
    "CP2": (2, [*CP2, *ep(1)]),
}


@pytest.mark.parametrize("layout", quick_or_slow(LAYOUTS, {"EP2", "VPP2"}))
def test_the_run_is_that_of_our_own_trainer_bit_for_bit(layout, run_yaml, tmp_path):
    ranks, flags = LAYOUTS[layout]
    flags = [*FLAGS, *flags]
    own = run_ranks(ranks, loop_programs.trained, run_yaml, flags, tmp_path / "own")[0]
    theirs = run_ranks(ranks, loop_programs.train, run_yaml, flags, tmp_path / "theirs")[0]
    assert theirs == own
    assert len(own["mixing"]) == 2 and own["mixing"][0]["counts"]


def test_what_is_repeated_counts_once(run_yaml, tmp_path):
    flags = [*FLAGS, *ep(1)]
    undisturbed = run_ranks(1, loop_programs.train, run_yaml, flags, tmp_path / "undisturbed")[0]
    assert (
        run_ranks(1, loop_programs.train_disturbed, run_yaml, flags, tmp_path / "disturbed")[0] == undisturbed
    )


def test_what_is_skipped_is_drawn_and_not_counted(run_yaml, tmp_path):
    flags = [*FLAGS, *ep(1)]
    first, counts, tokens, metrics = run_ranks(1, loop_programs.skip, run_yaml, flags, tmp_path / "run")[0]
    assert np.array_equal(counts[0], first) and np.any(first)
    assert not np.any(counts[1]) and tokens[1] == tokens[0], "nothing was trained on in the second interval"
    assert metrics == [(0, 8), (1, 16), (1, 24), (1, 32)]


@pytest.mark.parametrize("stopped", ["EP2", pytest.param("TP2 x EP2, ETP1", marks=pytest.mark.slow)])
def test_a_run_goes_on_in_mid_interval_on_another_layout(stopped, run_yaml, start_from, tmp_path):
    flags = [*start_from, *FLAGS[len(SMALL) :]]
    ranks, layout = LAYOUTS[stopped]
    _, whole = run_ranks(1, loop_programs.stop, run_yaml, [*flags, *ep(1)], tmp_path / "whole", 4)[0]
    states = run_ranks(ranks, loop_programs.stop, run_yaml, [*flags, *layout], tmp_path / "run", 3)
    state, resumed = states[0][0], [*flags, *ep(1), "--micro-batch-size", "4"]
    assert all(other == state for other, _ in states)
    _, run = run_ranks(1, loop_programs.stop, run_yaml, resumed, tmp_path / "run", 1, state)[0]
    for update, expected in zip(run["mixing"], whole["mixing"], strict=True):
        for name in ("new_weights", "counts", "tokens", "rows", "delta"):
            assert update[name] == expected[name], name
    assert run["samples"] == whole["samples"]
    assert verify(tmp_path / "run").proven


def test_a_layer_that_is_never_seen_ends_the_run_at_its_first_update(run_yaml, tmp_path):
    ranks = run_ranks(2, loop_programs.train_unseen, run_yaml, [*FLAGS, *ep(2)], tmp_path / "run")
    for message, iteration in ranks:
        assert message.startswith("the routers of MoE layers [0] (from 0, of 3) have counted none")
        assert iteration == 2


def test_a_wrong_call_says_what_would_be_right(run_yaml, tmp_path):
    told = run_ranks(1, loop_programs.misuse, run_yaml, [*FLAGS, *ep(1)], tmp_path / "run")[0]
    expected = {
        "attached twice": "attach was called before.*call it once",
        "ended, not begun": "end_step was called outside a step; call begin_step first",
        "announced, not begun": "announce was called outside a step; call begin_step first",
        "read, not begun": "a micro-batch was read outside a step; call begin_step first",
        "other rows": "the datasets have .* rows, but the run was begun with",
        "no state": "is no state of a MixedRun; give what state_dict returned",
        "other sources": "the state is of the sources .*, but the run has .*same order",
        "other seed": "seed 99",
        "other model": "the state counts .* the model has",
        "no micro-batch": "ends after 0 micro-batches announced.*it has 4 on each rank; announce each",
        "one micro-batch": "ends after 1 micro-batches announced.*it has 4 on each rank",
        "other batch": "consumed 1 samples after a step that began at 0, but its batch has 8",
        "masks of other rows": "rows gave masks of .*must be those of whole rows",
        "losses of other rows": "3 losses and a mask of 256 were given for a micro-batch of 256",
        "too many read": "more than the 4 micro-batches",
        "loaded late": "a step was begun already; load the state before",
        "probe": "signal is probe.*give signal train",
        "attention": "load_routers is attention.*leave it out",
        "strategy": "must be one of",
        "option": "etta is no option",
        "no reference": "needs mixing.reference",
        "batch": "a batch of 7 samples is no multiple of 2",
        "no batch": "a batch of 0 samples",
        "iterations": "train_iters is 0; it must be 1 or more",
        "weights": "nobody",
        "uniform": "use fixed",
        "caps": "rows are missing; raise max_epochs",
        "cap of nobody": "max_epochs names nobody",
        "examples": "examples_per_row is needed",
        "no sources": "no source is given",
        "two sources": "two are always equally far apart",
        "an empty source": "the size of source c is 0",
        "begun, not attached": "call attach first",
        "asked, not attached": "call attach first",
        "records of another run": "holds the records of another run",
    }
    assert told.keys() == expected.keys()
    for name, message in expected.items():
        assert re.search(message, told[name], re.DOTALL), (name, told[name])


def test_the_loop_of_the_page_draws_the_same_on_any_number_of_ranks(tmp_path):
    (block,) = [block for block in blocks_of(ROOT / "docs/api.md") if block.language == "python"]
    answers = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        answers.append(run_ranks(ranks, loop_programs.run_page, block.text, folder)[0])
        assert verify(Path(folder) / "run").proven
    (said, one), (said_by_two, two) = answers
    assert said.count("after iteration") == said_by_two.count("after iteration") == 3
    assert one["samples"][:3] == two["samples"][:3], "the samples of the first interval"
    weights_D = np.array(one["mixing"][-1]["new_weights"])
    assert weights_D.sum() == pytest.approx(1) and np.ptp(weights_D) > 0.01
