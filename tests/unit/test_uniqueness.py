"""Uniqueness: kinds of data count once, however many sources they come in. Axes as in the module."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.controller import ControllerState, MixingController
from megatron_dynmix.mixing.guardrails import Override
from megatron_dynmix.mixing.strategies.losses import RefLoss
from megatron_dynmix.mixing.strategies.planned import DataSize, Fixed, Uniform
from megatron_dynmix.mixing.strategies.uniqueness import SAME, Corrected, Uniqueness, likeness
from megatron_dynmix.mixing.strategy import Signal, SourceError

checked = settings(max_examples=60, derandomize=True)
PLAIN = Uniqueness(min_gap=0, alike_from=0)
COPIES = Uniqueness(min_gap=0)
either = pytest.mark.parametrize("rule", [PLAIN, COPIES], ids=["any likeness", "copies only"])


def loads(rng, number, layers=1, experts=8, concentration=6.0):
    return rng.dirichlet(np.full(experts, concentration), size=(number, layers))


def halves_of(rng, load_DLE, tokens, rows=None):
    """Counts in two halves; with `rows`, tokens of one row are alike."""
    halves_HDLE = np.zeros((2, *load_DLE.shape), np.int64)
    for place in np.ndindex(load_DLE.shape[:2]):
        if rows is None:
            halves_HDLE[(slice(None), *place)] = rng.multinomial([tokens // 2] * 2, load_DLE[place])
        else:
            of_row_RE = rng.dirichlet(20 * load_DLE.shape[2] * load_DLE[place], size=rows)
            counts_RE = rng.multinomial(tokens // rows, of_row_RE)
            halves_HDLE[(slice(None), *place)] = counts_RE[::2].sum(axis=0), counts_RE[1::2].sum(axis=0)
    return halves_HDLE


def propose(strategy, load_DLE=None, halves_HDLE=None, state=None):
    counts_DLE = load_DLE if halves_HDLE is None else halves_HDLE.sum(axis=0)
    signal = Signal(counts_DLE=counts_DLE, half_counts_HDLE=halves_HDLE)
    return strategy.propose(np.full(len(counts_DLE), 1 / len(counts_DLE)), signal, state or {})


def weights(strategy, load_DLE=None, halves_HDLE=None):
    return propose(strategy, load_DLE, halves_HDLE).weights_D


@st.composite
def any_loads(draw, least=2):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    number, layers = draw(st.integers(least, 12)), draw(st.integers(1, 3))
    load_DLE = loads(rng, number, layers, draw(st.integers(2, 16)), draw(st.sampled_from([0.3, 6.0, 200.0])))
    for copy, of in draw(st.lists(st.tuples(*[st.integers(0, number - 1)] * 2), max_size=4)):
        load_DLE[copy] = load_DLE[of]
    return load_DLE


@either
@checked
@given(any_loads(), st.randoms(use_true_random=False))
def test_permuting_sources_permutes_the_weights(rule, load_DLE, random):
    order = list(range(len(load_DLE)))
    random.shuffle(order)
    np.testing.assert_allclose(weights(rule, load_DLE[order]), weights(rule, load_DLE)[order], atol=1e-12)


@either
@checked
@given(any_loads())
def test_no_source_has_more_than_half_nor_less_than_one_over_the_square_of_their_number(rule, load_DLE):
    weights_D = weights(rule, load_DLE)
    assert abs(weights_D.sum() - 1) <= 1e-12
    assert weights_D.max() <= 0.5 + 1e-12 and weights_D.min() >= len(load_DLE) ** -2.0 - 1e-12


@either
@checked
@given(any_loads(3), st.integers(1, 6))
def test_a_source_given_more_than_once_has_in_all_what_it_has_alone(rule, load_DLE, copies):
    alone_D = weights(rule, load_DLE)
    more_D = weights(rule, np.concatenate([load_DLE, np.repeat(load_DLE[:1], copies, axis=0)]))
    alike_DD = likeness(Signal(counts_DLE=load_DLE), "all", 0, "").alike_DD
    same = np.flatnonzero(alike_DD[0] == 1)
    of_kind = [*same, *range(len(load_DLE), len(more_D))]
    assert np.ptp(more_D[of_kind]) <= 1e-12, "they share it evenly"
    if (alike_DD[0][alike_DD[0] < 1] < SAME).all():  # else what is nearly a copy counts in part
        assert abs(more_D[of_kind].sum() - alone_D[same].sum()) <= 1e-12
        others = np.flatnonzero(alike_DD[0] < 1)
        np.testing.assert_allclose(more_D[others], alone_D[others], atol=1e-12)


def test_splitting_a_source_whose_parts_are_measured_apart_changes_little():
    """Parts of one distribution have loads of their own, equal to noise only."""
    rng = np.random.default_rng(1)
    load_DLE = loads(rng, 5, layers=2)
    load_DLE[1] = 0.6 * load_DLE[0] + 0.4 * load_DLE[2]  # partly like two others
    whole_D = weights(Uniqueness(), halves_HDLE=halves_of(rng, load_DLE, 40_000))
    parts_DLE = np.concatenate([load_DLE, load_DLE[:1], load_DLE[:1]])
    parts_D = weights(Uniqueness(), halves_HDLE=halves_of(rng, parts_DLE, 40_000))
    np.testing.assert_allclose(parts_D[[0, 5, 6]].sum(), whole_D[0], rtol=0.1)
    np.testing.assert_allclose(parts_D[1:5], whole_D[1:], rtol=0.1)
    np.testing.assert_allclose(parts_D[[0, 5, 6]], parts_D[0], rtol=0.1)


@either
@pytest.mark.parametrize("number", [3, 4, 9, 40])
def test_a_near_copy_nearly_shares(rule, number):
    rng = np.random.default_rng(number)
    load_DLE = loads(rng, number)
    shares = []
    for apart in (0, 1e-6, 1e-3, 0.01, 0.03):
        load_DLE[1] = load_DLE[0] + apart * (load_DLE[2] - load_DLE[0])
        shares.append(weights(rule, load_DLE)[:2])
    exact, *near = np.array(shares)
    assert abs(exact[0] - exact[1]) <= 1e-12
    for share, most in zip(near, (1e-4, 0.03, 0.2, 0.6), strict=True):
        assert np.abs(share / exact - 1).max() <= most


@either
@pytest.mark.parametrize("number", [2, 3, 8, 64])
def test_sources_equally_far_from_each_other_have_the_prior(rule, number):
    load_DLE = np.full((number, 1, number), 1.0)
    load_DLE[np.arange(number), 0, np.arange(number)] = 3
    np.testing.assert_allclose(weights(rule, load_DLE), 1 / number, atol=1e-12)
    prior_D = np.arange(1.0, number + 1)
    given_D = weights(replace(rule, prior_D=prior_D.tolist()), load_DLE)
    np.testing.assert_allclose(given_D, prior_D / prior_D.sum(), atol=1e-12)


@either
def test_one_source_unlike_all_others_that_are_copies_has_half(rule):
    load_DLE = np.array([[[1, 0, 0]], *[[[0, 1, 1]]] * 7], float)
    np.testing.assert_allclose(weights(rule, load_DLE), [0.5, *[0.5 / 7] * 7], atol=1e-12)


@checked
@given(any_loads())
def test_two_sources_and_one_have_the_prior(load_DLE):
    assert weights(PLAIN, load_DLE[:2]).tolist() == [0.5, 0.5]
    assert weights(PLAIN, load_DLE[:1]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("number", "experts", "layers", "rows"),
    [
        (3, 8, 1, None),
        (4, 8, 1, 16),
        (8, 64, 4, None),
        (16, 256, 2, None),
        (64, 8, 1, 16),
        (64, 128, 1, None),
    ],
)
def test_pure_noise_gives_the_prior_and_says_so(number, experts, layers, rows):
    """Sources of one distribution; by mistake told apart in few of a hundred measurements."""
    rng = np.random.default_rng(number)
    prior_D = rng.uniform(1, 3, number)
    strategy, told_apart = Uniqueness(prior_D=prior_D.tolist()), 0
    repeats = 40 if number < 20 else 8
    for _ in range(repeats):
        load_DLE = np.repeat(loads(rng, 1, layers, experts), number, axis=0)
        proposal = propose(strategy, halves_HDLE=halves_of(rng, load_DLE, 4000, rows))
        if [note.kind for note in proposal.notes] != ["one_kind"]:
            told_apart += 1
            continue
        np.testing.assert_allclose(proposal.weights_D, prior_D / prior_D.sum(), atol=1e-12)
    assert told_apart <= 0.1 * repeats


@pytest.mark.parametrize(
    "rule", [Uniqueness(alike_from=0), Uniqueness()], ids=["any likeness", "copies only"]
)
@pytest.mark.parametrize("experts", [8, 64, 256])
@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize("number", [4, 16, 64])
def test_the_rule_is_the_same_for_any_number_of_sources_experts_and_layers(number, layers, experts, rule):
    """Half of the sources are copies of one: they get what one gets, the others the rest."""
    rng = np.random.default_rng(number + experts)
    load_DLE = loads(rng, number, layers, experts, concentration=3.0)
    load_DLE[: number // 2] = load_DLE[0]
    proposal = propose(rule, halves_HDLE=halves_of(rng, load_DLE, 300_000))
    kinds = number // 2 + 1
    of_copies = proposal.weights_D[: number // 2]
    assert proposal.notes == ()
    assert 0.5 < of_copies.sum() * kinds < 1.5
    np.testing.assert_allclose(of_copies, of_copies.mean(), rtol=0.35)


@pytest.mark.parametrize(("between", "share"), [(0.0, 1 / 4), (0.05, 0.3), (0.3, 1 / 3), (0.5, 1 / 3)])
def test_what_is_less_alike_than_alike_from_is_not_alike_at_all(between, share):
    """The second source lies so far on the way from the first to the third: similar by 1, .95, .7 and .5."""
    load_DLE = np.array([[[4.0, 1, 1]], [[4, 1, 1]], [[1, 4, 1]]])
    load_DLE[1] += between * (load_DLE[2] - load_DLE[0])
    found_D = weights(COPIES, load_DLE)
    assert found_D[0] == found_D[1]
    assert abs(found_D[0] - share) <= (1e-12 if between != 0.05 else 0.02)
    if between >= 0.3:
        assert weights(PLAIN, load_DLE)[1] < 0.3, "it is like both of the others"


def test_what_noise_explains_moves_nothing_and_the_rest_more_the_surer_it_is():
    rng = np.random.default_rng(3)
    halves_HDLE = halves_of(rng, loads(rng, 4), 2000)
    moved = [
        np.ptp(weights(Uniqueness(min_gap=gap, alike_from=0), halves_HDLE=halves_HDLE))
        for gap in (2, 4, 6, 100)
    ]
    assert moved[0] > 0.05 and moved[-1] <= 1e-15


def test_earlier_updates_are_averaged_in():
    rng = np.random.default_rng(0)
    first, second = loads(rng, 4), loads(rng, 4)
    strategy = replace(PLAIN, average=0.75)
    one = propose(strategy, first)
    np.testing.assert_array_equal(one.weights_D, weights(PLAIN, first))
    two = propose(strategy, second, state=one.state)
    expected_D = 0.25 * weights(PLAIN, second) + 0.75 * one.weights_D
    np.testing.assert_allclose(two.weights_D, expected_D, atol=1e-15)
    assert propose(PLAIN, first).state == {}


def in_rows(rng, load_DLE, rows_D, first_D, tokens=400):
    """Halves of so many rows of each source, counted from the first on; tokens of one row are alike."""
    halves_HDLE = np.zeros((2, *load_DLE.shape), np.int64)
    for source, layer in np.ndindex(load_DLE.shape[:2]):
        for row in range(first_D[source], first_D[source] + rows_D[source]):
            of_row_E = rng.dirichlet(20 * load_DLE.shape[2] * load_DLE[source, layer])
            halves_HDLE[row % 2, source, layer] += rng.multinomial(tokens, of_row_E)
    return halves_HDLE


@pytest.mark.parametrize("alike_from", [0, SAME])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_source_that_gets_few_rows_is_not_taken_for_a_copy_because_of_it(alike_from, seed):
    """Rows drawn by the weights that the ones before led to, four of each source at first."""
    rng, number, strategy = np.random.default_rng(seed), 19, Uniqueness(alike_from=alike_from)
    load_DLE = loads(rng, number, layers=2)
    load_DLE[3] = load_DLE[2]
    right_D = weights(strategy, halves_HDLE=in_rows(rng, load_DLE, [100] * number, [0] * number))
    controller = MixingController([f"s{d}" for d in range(number)], np.full(number, 1 / number), strategy)
    drawn_D, due_D = np.zeros(number, int), np.zeros(number)
    for _ in range(20):
        due_D += 80 * controller.weights_D
        rows_D = due_D.astype(int) - drawn_D
        halves_HDLE = in_rows(rng, load_DLE, rows_D, drawn_D)
        drawn_D += rows_D
        controller.update(Signal(counts_DLE=halves_HDLE.sum(axis=0), half_counts_HDLE=halves_HDLE))
    assert (controller.weights_D > 0.5 * right_D).all() and (controller.weights_D < 2 * right_D).all()
    assert drawn_D.min() >= 0.5 * 20 * 80 / number * min(1, number * right_D.min())


def test_counts_go_back_as_far_as_it_takes():
    rng = np.random.default_rng(4)
    load_DLE, strategy = loads(rng, 6, layers=2), Uniqueness(alike_from=0)
    load_DLE[5] = load_DLE[0]
    apart = []
    state, updates = {}, 60
    for update in range(updates):
        proposal = propose(strategy, halves_HDLE=in_rows(rng, load_DLE, [4] * 6, [0] * 6), state=state)
        state = json.loads(json.dumps(proposal.state))
        apart.append(np.abs(proposal.weights_D - 1 / 6).max())
        kept = np.array(state["half_counts"]).sum() / (6 * 2 * 4 * 400)
        assert kept <= update + 1
    assert apart[0] < 0.3 * apart[-1], "at first weights stay near the prior"
    assert kept < 0.5 * updates, "and no further"
    right_D = weights(strategy, halves_HDLE=in_rows(rng, load_DLE, [400] * 6, [0] * 6))
    np.testing.assert_allclose(proposal.weights_D, right_D, rtol=0.2)
    plenty = propose(strategy, halves_HDLE=in_rows(rng, load_DLE, [400] * 6, [0] * 6), state=state)
    assert plenty.state == {}, "one update is enough: nothing is remembered"
    np.testing.assert_allclose(plenty.weights_D, right_D, rtol=0.1)


def test_last_known_counts_are_not_counted_twice():
    """The second source has no rows for a while: what is known of it stays what it was."""
    rng = np.random.default_rng(5)
    load_DLE = loads(rng, 4)
    controller = MixingController(list("abcd"), np.full(4, 1 / 4), Uniqueness())
    first_HDLE = in_rows(rng, load_DLE, [4] * 4, [0] * 4)
    for update in range(6):
        new_HDLE = first_HDLE if update == 0 else in_rows(rng, load_DLE, [4, 0, 4, 4], [0] * 4)
        decision = controller.update(Signal(counts_DLE=new_HDLE.sum(axis=0), half_counts_HDLE=new_HDLE))
        kept_HDLE = np.array(controller.state.course.state["half_counts"])
        np.testing.assert_array_equal(kept_HDLE[:, 1], first_HDLE[:, 1])
        assert np.flatnonzero(decision.signal.stale_D).tolist() == [1] if update else True
    assert kept_HDLE[:, 0].sum() > 3 * first_HDLE[:, 0].sum()


def test_a_source_that_is_no_longer_drawn_keeps_what_is_known_of_it():
    """Also where the others are known well enough by one update."""
    rng = np.random.default_rng(7)
    load_DLE = loads(rng, 5, layers=2)
    load_DLE[4] = load_DLE[0]
    controller = MixingController(list("abcde"), np.full(5, 1 / 5), Uniqueness())
    for update in range(12):
        rows = [4, 4, 4, 4, 4] if update < 6 else [300, 300, 300, 0, 300]
        new_HDLE = in_rows(rng, load_DLE, rows, [0] * 5)
        decision = controller.update(Signal(counts_DLE=new_HDLE.sum(axis=0), half_counts_HDLE=new_HDLE))
        if update == 5:
            known_HLE = np.array(controller.state.course.state["half_counts"])[:, 3]
    kept_HDLE = np.array(controller.state.course.state["half_counts"])
    np.testing.assert_array_equal(kept_HDLE[:, 3], known_HLE)
    np.testing.assert_allclose(decision.weights_D, [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8], rtol=0.1)


def test_a_source_that_was_hardly_seen_and_is_gone_keeps_nobody_waiting():
    rng = np.random.default_rng(8)
    load_DLE = loads(rng, 5, layers=2)
    load_DLE[1] = load_DLE[0]
    controller = MixingController(list("abcde"), np.full(5, 1 / 5), Uniqueness())
    for update in range(20):
        rows = [2] * 5 if update == 0 else [40, 40, 40, 40, 0]
        new_HDLE = in_rows(rng, load_DLE, rows, [0] * 5)
        decision = controller.update(Signal(counts_DLE=new_HDLE.sum(axis=0), half_counts_HDLE=new_HDLE))
    assert decision.weights_D[0] + decision.weights_D[1] < 1.3 * decision.weights_D[2]


def test_a_source_of_one_row_an_update_is_measured_at_every_second_one():
    """Its rows fall into one half and the other in turn; a half alone tells nothing of the noise."""
    rng = np.random.default_rng(9)
    load_DLE, names = loads(rng, 4), list("abcd")
    controller = MixingController(names, np.full(4, 1 / 4), Uniqueness())
    for update in range(6):
        rows_HDLE = in_rows(rng, load_DLE, [20, 20, 20, 1], [0, 0, 0, update])
        signal = Signal(counts_DLE=rows_HDLE.sum(axis=0), half_counts_HDLE=rows_HDLE)
        decision = controller.update(signal)
        again = MixingController(names, np.full(4, 1 / 4), Uniqueness())
        again.resume(ControllerState.from_json(json.loads(json.dumps(controller.state.to_json()))))
        controller = again
        if update == 0:
            assert [note.kind for note in decision.notes] == ["kept"] and decision.signal.stale_D is not None
            before_HLE = rows_HDLE[:, 3]
        elif update == 1:
            np.testing.assert_array_equal(
                decision.signal.half_counts_HDLE[:, 3], before_HLE + rows_HDLE[:, 3]
            )
            assert decision.signal.stale_D is None
        elif update % 2 == 0:
            assert decision.signal.stale_D.tolist() == [False, False, False, True]
    assert np.array(controller.state.course.state["half_counts"])[:, 3].sum() == 6 * 400


def test_a_source_that_was_never_measured_has_no_last_known_counts():
    counts_DLE = np.array([[[5, 1]], [[1, 5]], [[0, 0]]])
    controller = MixingController(list("abc"), np.full(3, 1 / 3), Uniqueness())
    decision = controller.update(
        Signal(counts_DLE=2 * counts_DLE, half_counts_HDLE=np.stack([counts_DLE] * 2))
    )
    assert decision.signal.stale_D.tolist() == [False] * 3


def test_rows_that_are_measured_again_and_again_are_not_added_up():
    """A fixed probe: its newest counts are all there is to know, and no weight decides what it measures."""
    rng = np.random.default_rng(10)
    halves_HDLE = in_rows(rng, loads(rng, 4, layers=2), [4] * 4, [0] * 4)
    signal = Signal(counts_DLE=halves_HDLE.sum(axis=0), half_counts_HDLE=halves_HDLE)
    even_D = np.full(4, 1 / 4)
    partial = Uniqueness(alike_from=0)
    train = partial.propose(even_D, signal, {})
    probe = partial.propose(even_D, replace(signal, same_rows=True), train.state)
    assert train.state and not probe.state
    assert [note.kind for note in train.notes] == ["uncertain"] and probe.notes == ()
    found = likeness(signal, "all", 2.0, "")
    np.testing.assert_allclose(probe.delta_D, found.unique_D(0))
    assert np.ptp(train.weights_D) < np.ptp(probe.weights_D)


@pytest.mark.parametrize("layers", ["last", [0, 2]])
def test_only_layers_that_are_read_are_remembered(layers):
    rng = np.random.default_rng(11)
    halves_HDLE = in_rows(rng, loads(rng, 4, layers=3), [2] * 4, [0] * 4)
    state = propose(Uniqueness(layers=layers), halves_HDLE=halves_HDLE).state
    chosen = [2] if layers == "last" else layers
    np.testing.assert_array_equal(state["half_counts"], halves_HDLE[:, :, chosen])


def test_a_single_source_remembers_nothing():
    rng = np.random.default_rng(12)
    assert propose(Uniqueness(), halves_HDLE=in_rows(rng, loads(rng, 1), [2], [0])).state == {}


def test_counts_of_another_model_are_refused():
    rng = np.random.default_rng(6)
    few = propose(Uniqueness(), halves_HDLE=in_rows(rng, loads(rng, 3), [2] * 3, [0] * 3))
    with pytest.raises(ValueError, match="remembers counts of shape"):
        other_HDLE = in_rows(rng, loads(rng, 3, layers=2), [2] * 3, [0] * 3)
        propose(Uniqueness(), halves_HDLE=other_HDLE, state=few.state)


def test_the_controller_passes_the_note_on():
    names = ["a", "b", "c"]
    controller = MixingController(names, np.full(3, 1 / 3), PLAIN)
    decision = controller.update(Signal(counts_DLE=np.ones((3, 1, 4), np.int64)))
    assert [note.kind for note in decision.notes] == ["one_kind"]
    controller = MixingController(names, np.full(3, 1 / 3), PLAIN)
    assert controller.update(Signal(counts_DLE=np.eye(3, dtype=int)[:, None] + 1)).notes == ()


def corrected_of(inner, halves_HDLE, updates=1, loss_D=None, weights_D=None, override=None):
    """A controller after some updates on the same signal."""
    number = halves_HDLE.shape[1]
    weights_D = np.full(number, 1 / number) if weights_D is None else weights_D
    controller = MixingController([f"s{d}" for d in range(number)], weights_D, Corrected(inner))
    signal = Signal(
        counts_DLE=halves_HDLE.sum(axis=0),
        half_counts_HDLE=halves_HDLE,
        loss_D=loss_D,
        size_D=np.arange(1, number + 1),
    )
    controller.start(Signal(size_D=signal.size_D))
    for _ in range(updates):
        controller.update(signal, override)
        again = MixingController(controller.sources, weights_D, Corrected(inner))
        again.resume(ControllerState.from_json(json.loads(json.dumps(controller.state.to_json()))))
        controller = again
    return controller


def copies_of_the_first(seed=0):
    rng = np.random.default_rng(seed)
    halves_HDLE = halves_of(rng, loads(rng, 5, layers=2), 20_000)
    halves_HDLE[:, 3:] = halves_HDLE[:, :1]
    return halves_HDLE


@pytest.mark.parametrize("inner", [Uniform(), Fixed()], ids=["uniform", "fixed"])
@pytest.mark.parametrize("updates", [1, 7])
def test_even_weights_corrected_are_uniqueness(inner, updates):
    halves_HDLE = copies_of_the_first()
    expected_D = weights(Uniqueness(), halves_HDLE=halves_HDLE)
    np.testing.assert_allclose(
        corrected_of(inner, halves_HDLE, updates).weights_D, expected_D, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("updates", [1, 30])
def test_a_correction_does_not_add_up_in_a_strategy_that_does(updates):
    """Copies have in all what one of them has alone, however many updates there were."""
    halves_HDLE, loss_D = copies_of_the_first(), np.array([2.1, 2.0, 2.05, 2.1, 2.1])
    inner = RefLoss(reference_D=[2.0] * 5, smoothing=0)
    unique_D = propose(Uniqueness(), halves_HDLE=halves_HDLE).delta_D
    grown_D = np.exp(updates * (loss_D - 2)) * unique_D
    found_D = corrected_of(inner, halves_HDLE, updates, loss_D).weights_D
    np.testing.assert_allclose(found_D, grown_D / grown_D.sum(), rtol=1e-9)
    assert np.ptp(found_D[[0, 3, 4]]) <= 1e-12


def test_weights_that_stay_come_back_when_an_override_ends():
    halves_HDLE = copies_of_the_first()
    controller = corrected_of(DataSize(), halves_HDLE, 2)
    before_D = controller.weights_D
    signal = Signal(counts_DLE=halves_HDLE.sum(axis=0), half_counts_HDLE=halves_HDLE)
    controller.update(signal, Override(weights={"s0": 0.9, "s1": 0.1}))
    assert controller.weights_D.tolist() == [0.9, 0.1, 0, 0, 0]
    controller.update(signal)
    np.testing.assert_allclose(controller.weights_D, before_D, rtol=0, atol=1e-12)
    sizes_D = np.arange(1, 6) * propose(Uniqueness(), halves_HDLE=halves_HDLE).delta_D
    np.testing.assert_allclose(before_D, sizes_D / sizes_D.sum(), rtol=0, atol=1e-12)


def test_a_correction_makes_gate_loads_needed_and_is_none_of_uniqueness():
    assert MixingConfig(strategy="uniform").chosen.needs == (False, False)
    assert MixingConfig(strategy="uniform", similarity_correction=True).chosen.needs == (True, False)
    with pytest.raises(InputError, match="is what uniqueness does itself"):
        MixingConfig(strategy="uniqueness", similarity_correction=True)


def test_what_the_strategy_refuses_is_refused_at_the_start():
    with pytest.raises(ValueError, match="uniform mixing was given weights"):
        corrected_of(Uniform(), copies_of_the_first(), weights_D=np.array([0.6, 0.1, 0.1, 0.1, 0.1]))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"min_gap": -1}, "min_gap -1"),
        ({"min_gap": float("nan")}, "min_gap nan"),
        ({"average": 1}, "average 1"),
        ({"layers": "first"}, "layers 'first'"),
        ({"prior_D": [1, -1]}, "negative"),
        ({"prior_D": [0, 0]}, "at least one must be > 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options, part):
    with pytest.raises(ValueError, match=part):
        Uniqueness(**options)


def test_a_signal_that_does_not_tell_is_refused():
    with pytest.raises(ValueError, match="needs token counts per expert"):
        Uniqueness().propose(np.full(3, 1 / 3), Signal(), {})
    counts_DLE = np.ones((3, 1, 4), np.int64)
    with pytest.raises(ValueError, match="needs the counts in two halves"):
        propose(Uniqueness(), counts_DLE)
    with pytest.raises(SourceError, match="tokens in both halves"):
        propose(Uniqueness(), halves_HDLE=np.stack([counts_DLE, 0 * counts_DLE]))
    with pytest.raises(ValueError, match="prior for 2"):
        propose(Uniqueness(min_gap=0, prior_D=[1, 2]), counts_DLE)
