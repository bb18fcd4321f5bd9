import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_fixtures import INTERVAL, fake_run

from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.controller import MixingController
from megatron_dynmix.mixing.strategies.gate_load import GateLoad
from megatron_dynmix.mixing.strategies.planned import DataSize
from megatron_dynmix.mixing.strategy import InExamples, Signal, in_examples
from megatron_dynmix.mixing.weights import example_shares, normalise_weights, reweight, row_shares
from megatron_dynmix.training.mix_setup import resolve_files, strategy_of
from megatron_dynmix.training.reweighting import read_override
from megatron_dynmix.verify.verify import verify_records

PER_ROW = np.array([6.0, 3.0])
EXAMPLES_PER_ROW = [18.0, 6.0, 2.5]


@st.composite
def mixes(draw):
    """(weights_D, examples_per_row_D), some sources paused."""
    sources = draw(st.integers(1, 12))
    raw = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=sources, max_size=sources))
    raw[draw(st.integers(0, sources - 1))] = draw(st.floats(0.1, 10))
    per_row = draw(st.lists(st.floats(1, 5000), min_size=sources, max_size=sources))
    return normalise_weights(raw), np.array(per_row)


@settings(max_examples=200)
@given(mix=mixes())
def test_one_unit_is_the_inverse_of_the_other(mix):
    weights_D, per_row_D = mix
    rows_D = row_shares(weights_D, per_row_D)
    for shares_D in (rows_D, example_shares(weights_D, per_row_D)):
        assert abs(shares_D.sum() - 1) < 1e-12
        assert ((shares_D == 0) == (weights_D == 0)).all()
    np.testing.assert_allclose(example_shares(rows_D, per_row_D), weights_D, rtol=1e-12)
    np.testing.assert_allclose(
        row_shares(example_shares(weights_D, per_row_D), per_row_D), weights_D, rtol=1e-12
    )


def test_rows_drawn_by_row_shares_hold_the_examples_asked_for():
    # 10 rows of 6 examples and 20 rows of 3 hold 60 examples each
    np.testing.assert_allclose(row_shares(np.array([0.5, 0.5]), np.array([6.0, 3.0])), [1 / 3, 2 / 3])


def test_equal_rows_change_no_bit():
    weights_D = normalise_weights([0.1, 0.2, 0.30000001])
    assert row_shares(weights_D, np.full(3, 7.3)).tolist() == weights_D.tolist()


@pytest.mark.parametrize(
    ("per_row", "named"),
    [
        ([1.0], "one for each of 2 sources"),
        ([1.0, 0.5], "1 or more"),
        ([1.0, np.nan], "1 or more"),
        ([1.0, np.inf], "finite"),
    ],
)
def test_refusals(per_row, named):
    with pytest.raises(ValueError, match=named):
        row_shares(np.array([0.5, 0.5]), np.array(per_row))
    with pytest.raises(ValueError, match="not to 1"):
        row_shares(np.array([0.5, 0.6]), np.array([1.0, 1.0]))


def test_a_signal_in_examples():
    # two thirds of the rows hold 3 examples, one third 6: 4 in a row on average
    signal = Signal(
        size_D=np.array([10, 7]), drawn_D=np.array([2, 0]), interval_rows=30, run_rows=300, seed=3
    )
    there = in_examples(signal, np.array([1 / 3, 2 / 3]), PER_ROW)
    assert there.size_D.tolist() == [60, 21]
    assert there.drawn_D.tolist() == [12, 0]
    assert (there.interval_rows, there.run_rows, there.seed) == (120, 1200, 3)
    assert in_examples(Signal(), np.array([0.5, 0.5]), PER_ROW).size_D is None


def test_a_strategy_works_in_examples_and_proposes_rows():
    gate_load, per_row_D = GateLoad(eta=10, smoothing=0.05), np.array([6.0, 3.0, 1.0])
    signal = Signal(counts_DLE=np.array([[[20.0, 15, 14]], [[10, 22, 8]], [[9, 9, 30]]]))
    examples_D = np.array([0.3, 0.5, 0.2])
    strategy = InExamples(gate_load, per_row_D)
    proposal = strategy.propose(row_shares(examples_D, per_row_D), signal, {})
    inner = gate_load.propose(examples_D, signal, {})
    np.testing.assert_allclose(example_shares(proposal.weights_D, per_row_D), inner.weights_D, rtol=1e-12)
    np.testing.assert_allclose(proposal.delta_D, inner.delta_D, rtol=1e-12)
    for name in ("name", "needs_gate_load", "needs_loss", "needs_halves", "starts", "updates", "layers"):
        assert getattr(strategy, name) == getattr(gate_load, name)
    assert InExamples(DataSize(), per_row_D).layers == "all"
    assert not InExamples(DataSize(), per_row_D).needs_halves


def test_a_strategy_that_starts_sees_sizes_in_examples():
    first_D = row_shares(np.array([0.5, 0.5]), PER_ROW)
    strategy = InExamples(DataSize(), PER_ROW)
    # 20 rows of 6 examples and 10 rows of 3: every epoch draws 20 rows and 10
    controller = MixingController(("a", "b"), first_D, strategy)
    decision = controller.start(Signal(size_D=np.array([20, 10]), drawn_D=np.zeros(2, np.int64)))
    np.testing.assert_allclose(decision.weights_D, [2 / 3, 1 / 3])


def run_in_examples(iterations=12, **settings):
    mixing = MixingConfig(strategy="gate-load", interval=INTERVAL, unit="examples")
    resolved = {"examples_per_row": [18.0, 6.0, 2.5], **settings}
    return fake_run(iterations, settings=mixing, resolved=resolved)


def test_a_run_in_examples_is_proven_and_records_both_shares():
    run = run_in_examples()
    verdict = verify_records(run.records(state=run.state()))
    assert verdict.failure is None
    assert verdict.updates == 4
    per_row_D = np.array(run.resolved["examples_per_row"])
    for record in run.records().mixing.values():
        old_D = example_shares(np.array(record["old_weights"]), per_row_D)
        expected_D = reweight(old_D, np.array(record["delta"]), eta=10, smoothing=0.05)
        new_D = example_shares(np.array(record["new_weights"]), per_row_D)
        np.testing.assert_allclose(new_D, expected_D, rtol=1e-9)


def test_other_examples_per_row_disprove_a_run():
    run = run_in_examples()
    records = run.records()
    for line in records.ledger:
        if line["kind"] == "stage" and line["why"] == "update":
            line["resolved"]["examples_per_row"][0] = 17.0
    assert "new_weights does not follow" in verify_records(records).failure


def test_caps_of_a_run_in_examples_are_kept_in_rows():
    run = run_in_examples(30, max_epochs=[None, 3, None])
    assert 31 <= run.blend.drawn_D(run.consumed)[1] <= 33
    assert verify_records(run.records()).failure is None


def test_an_operators_weights_are_in_the_unit_of_the_run(tmp_path):
    run = run_in_examples(0)
    path = tmp_path / "override.json"
    path.write_text('{"weights": {"chat": 0.5, "math": 0.5}, "pause": ["code"]}')
    said = read_override(path, run.controller.sources, run.resolved)
    assert said.pause == ("code",)
    # a row of chat holds three times the examples of one of math
    assert said.weights == {"chat": pytest.approx(0.25), "math": pytest.approx(0.75)}


def test_weights_of_another_run_are_shares_of_rows_already(tmp_path):
    update = {"iteration": 1, "sources": ["a", "b", "c"], "new_weights": [0.2, 0.3, 0.5]}
    (tmp_path / "mixing.jsonl").write_text(json.dumps(update) + "\n")
    assert first_weights(tmp_path).tolist() == pytest.approx([0.2, 0.3, 0.5])


def test_weights_of_a_file_are_in_the_unit_of_the_run(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text('{"a": 0.2, "b": 0.3, "c": 0.5}')
    shares_D = np.array([0.2, 0.3, 0.5]) / EXAMPLES_PER_ROW
    assert first_weights(path).tolist() == pytest.approx((shares_D / shares_D.sum()).tolist())


def first_weights(weights_from):
    """The shares of rows that a run in examples begins with."""
    mixing = MixingConfig(strategy="final-static", weights_from=str(weights_from), unit="examples")
    resolved = {**resolve_files(mixing, ["a", "b", "c"]), "examples_per_row": EXAMPLES_PER_ROW}
    return strategy_of(mixing.chosen, resolved).propose(np.full(3, 1 / 3), Signal(), {}).weights_D


def test_an_unknown_unit_is_refused():
    with pytest.raises(InputError, match="one of tokens, examples"):
        MixingConfig(unit="words")
