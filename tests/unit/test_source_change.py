"""The state of a run, carried over to other sources. Axes: D sources."""

from dataclasses import replace

import numpy as np
import pytest
from run_fixtures import fake_run

from megatron_dynmix.data.blend import advance
from megatron_dynmix.data.source_set import SourceSet, differences
from megatron_dynmix.training.source_change import SourceChange

CHAT, MATH, CODE, LAW = (
    ["sha of " + name, "tokenizer", "template"] for name in ("chat", "math", "code", "law")
)
BEFORE = {"chat": CHAT, "math": MATH, "code": CODE}


@pytest.mark.parametrize(
    "after, found",
    [
        (BEFORE, []),
        ({**BEFORE, "law": LAW}, ["law is new"]),
        ({"chat": CHAT, "code": CODE}, ["math was removed"]),
        ({**BEFORE, "math": LAW}, ["the data, tokenizer or template of math changed"]),
        (
            {"maths": MATH, "chat": CHAT, "code": CODE},
            ["math was removed", "maths is new (it holds what math held)"],
        ),
        (
            {"math": MATH, "chat": CHAT, "code": CODE},
            ["the order was chat, math, code and is math, chat, code"],
        ),
        (
            {"chat": MATH, "math": CHAT, "code": CODE},
            ["the data, tokenizer or template of chat, math changed"],
        ),
        (
            {"code": LAW, "chat": CHAT, "law": LAW},
            [
                "math was removed",
                "law is new",
                "the data, tokenizer or template of code changed",
                "the order was chat, math, code and is code, chat, law",
            ],
        ),
    ],
)
def test_all_differences_are_listed(after, found):
    assert differences(BEFORE, after) == found


def change_to(run, prints, sizes):
    state = run.state()
    before = SourceSet.of(state.fingerprints, state.mix.blend.sizes)
    return SourceChange.between(before, SourceSet.of(prints, sizes)), state


def cursor_of(run):
    return run.blend.cursor_at(run.consumed)


def test_unchanged_sources_go_on_where_they_stood_and_others_begin():
    run = fake_run(10)
    stood = cursor_of(run)
    change, state = change_to(run, {"math": MATH, "law": LAW, "chat": CODE}, (11, 9, 55))
    untouched = state.text()
    carried, lines = change.carry(state, np.array([0.25, 0.5, 0.25]))
    assert state.text() == untouched
    blend, controller = carried.mix.blend, carried.mix.controller
    assert blend.cursor.drawn_D.tolist() == [stood.drawn_D[1], 0, 0]
    assert blend.cursor.owed_D.tolist() == [stood.owed_D[1], 0.0, 0.0]
    assert blend.sizes == (11, 9, 55) and blend.cursor.sample == run.consumed
    assert blend.stages[:-1] == state.mix.blend.stages
    weights = blend.stages[-1].weights
    chat, math, _ = state.mix.controller.course.weights_D
    assert weights == tuple(controller.course.weights_D) and sum(weights) == pytest.approx(1, abs=1e-12)
    assert weights == pytest.approx([0.5 * math / (chat + math), 0.5, 0.5 * chat / (chat + math)], abs=1e-12)
    assert (carried.mix.interval_counts.transpose(0, 2, 3, 1) == [2, 0, 0]).all()
    assert carried.mix.interval_stats.sums.tolist() == [[1.0, 0.0, 0.0]] * 3
    math_counts, *others = controller.known.values["tokens"]
    assert math_counts is state.mix.controller.known.values["tokens"][1] and others == [None, None]
    assert carried.progress.tokens_D.tolist() == [200.0, 0.0, 100.0]
    assert carried.log_interval.stats.sums.tolist() == [[1.0, 0.0, 0.0]] * 3
    assert lines[0].startswith("math: as it was, goes on after ") and "0.500000" in lines[1]
    assert lines[2].startswith("chat: changed, 40 -> 55 rows, from the first row on, weight ")
    assert lines[3] == "code: removed"


def test_a_dense_model_has_no_counts_to_carry_over():
    change, state = change_to(fake_run(10), {"math": MATH, "law": LAW}, (11, 9))
    dense = replace(state, mix=replace(state.mix, interval_counts=np.zeros((2, 3, 0), np.int64)))
    carried, _ = change.carry(dense, np.array([0.5, 0.5]))
    assert carried.mix.interval_counts.shape == (2, 2, 0) and carried.mix.interval_stats.sums.shape == (3, 2)


def test_the_place_is_that_of_the_resumed_sample_not_of_the_chunk():
    run = fake_run(10)  # the last chunk began at sample 72
    change, state = change_to(run, BEFORE, run.sizes)
    carried, _ = change.carry(state, np.full(3, 1 / 3))
    drawn_D = carried.mix.blend.cursor.drawn_D
    assert drawn_D.tolist() == cursor_of(run).drawn_D.tolist() and drawn_D.sum() == 80


def test_I4_an_epoch_in_hand_is_finished_without_repeats():
    """`math` is in a later epoch and gets another index: its rows go on in the same shuffle."""
    run = fake_run(14)
    before = run.blend.drawn_D(run.consumed)[1]
    assert before > 11 and before % 11
    rows = []
    follow = fake_run()
    for _ in range(14):
        follow.blend.advance_to(follow.consumed)
        rows += [row for d, row, _ in follow.blend.draws(follow.consumed, follow.consumed + 8) if d == 1]
        follow.train(1)
    assert len(rows) == before
    run.change_sources({"law": LAW, "math": MATH, "chat": CHAT}, (9, 11, 40))
    for _ in range(6):
        run.blend.advance_to(run.consumed)
        rows += [row for d, row, _ in run.blend.draws(run.consumed, run.consumed + 8) if d == 1]
        run.train(1)
    for start in range(0, len(rows) - 10, 11):
        assert sorted(rows[start : start + 11]) == list(range(11))


@pytest.mark.parametrize(
    "old, prints, initial, new",
    [
        ([0.2, 0.3, 0.5], BEFORE, [1 / 3] * 3, [0.2, 0.3, 0.5]),
        ([0.2, 0.3, 0.5], {"code": CODE, "chat": CHAT}, [0.5, 0.5], [5 / 7, 2 / 7]),
        ([0.2, 0.3, 0.5], {**BEFORE, "law": LAW}, [0.25] * 4, [0.15, 0.225, 0.375, 0.25]),
        ([0.0, 0.0, 1.0], {"chat": CHAT, "math": MATH}, [0.25, 0.75], [0.25, 0.75]),  # only paused ones stay
        ([0.2, 0.3, 0.5], {"a": LAW, "b": MATH}, [0.25, 0.75], [0.25, 0.75]),
        ([0.2, 0.3, 0.5], {"chat": CHAT, "law": LAW}, [0.0, 1.0], [0.0, 1.0]),
    ],
    ids=["the same", "removed", "added", "paused", "all new", "none left"],
)
def test_weights_keep_their_proportion(old, prints, initial, new):
    run = fake_run()
    change, _ = change_to(run, prints, tuple(range(5, 5 + len(prints))))
    assert change.weights_D(old, np.array(initial)) == pytest.approx(new, abs=1e-12)


def test_what_a_removed_source_was_owed_leaves_with_it():
    run = fake_run(10)
    gone = cursor_of(run).owed_D[0]
    run.change_sources({"math": MATH, "law": LAW, "code": CODE}, (11, 9, 23))
    begin = cursor_of(run)
    assert begin.owed_D.sum() == pytest.approx(-gone, abs=1e-9) and gone
    after = advance(begin, run.blend.weights_D, 24, run.consumed + 48)
    assert (after.drawn_D - begin.drawn_D).sum() == 48
    assert np.abs(after.owed_D).max() < 1
