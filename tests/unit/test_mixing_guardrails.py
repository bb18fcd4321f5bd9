"""Guardrails: what they promise holds for any proposal, and what is off changes no bit."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_dynmix.mixing.guardrails import Guardrails
from megatron_dynmix.mixing.strategy import Remark, Signal
from megatron_dynmix.mixing.weights import entropy, fit_shares, kl_divergence, normalise_weights, unevenness

checked = settings(max_examples=80, derandomize=True)
ROWS = 1000
TINY = 1e-12


def names(number):
    return [f"s{index}" for index in range(number)]


def apply(guardrails, old_D, proposed_D, signal=None, paused=()):
    paused_D = np.isin(np.arange(len(old_D)), paused)
    return guardrails.apply(
        np.array(old_D), np.array(proposed_D), signal or Signal(), paused_D, names(len(old_D))
    )


@st.composite
def mixes(draw, lowest=0.001):
    """Weights in force and proposed, of the same sources."""
    number = draw(st.integers(2, 8))
    values = arrays(np.float64, number, elements=st.floats(lowest, 1))
    return normalise_weights(draw(values)), normalise_weights(draw(values))


@st.composite
def situations(draw):
    """Guardrails of all kinds at once, weights, and a signal under which they can be kept."""
    old_D, proposed_D = draw(mixes())
    number = len(old_D)
    sizes_D = draw(arrays(np.int64, number, elements=st.integers(100, 5000)))
    drawn_D = draw(arrays(np.int64, number, elements=st.integers(0, 4000)))
    epochs_D = draw(arrays(np.float64, number, elements=st.sampled_from([0.5, 1.0, 2.0, math.inf])))
    epochs_D[draw(st.integers(0, number - 1))] = math.inf
    uncapped = np.flatnonzero(np.isinf(epochs_D))
    paused = draw(st.sets(st.integers(0, number - 1), max_size=number - 1)) - {int(uncapped[0])}
    guardrails = Guardrails(
        floor=draw(st.floats(0, 1 / number)),
        max_kl_step=draw(st.none() | st.floats(1e-4, 1)),
        min_entropy=draw(st.none() | st.floats(0, 1)),
        prior_D=np.full(number, 1 / number),
        prior_pull=draw(st.sampled_from([0.0, 0.3, 1.0])),
        max_epochs_D=epochs_D,
    )
    signal = Signal(size_D=sizes_D, drawn_D=drawn_D, interval_rows=ROWS)
    return guardrails, old_D, proposed_D, signal, sorted(paused)


def rows_left(guardrails, signal):
    capped_D = np.isfinite(guardrails.max_epochs_D)
    budget_D = np.floor(np.where(capped_D, guardrails.max_epochs_D, 0) * signal.size_D)
    return np.where(capped_D, np.maximum(budget_D - signal.drawn_D, 0), ROWS)


@checked
@given(situations())
def test_all_at_once_the_result_is_a_mix_without_paused_sources_or_overshot_caps(situation):
    guardrails, old_D, proposed_D, signal, paused = situation
    weights_D = apply(guardrails, old_D, proposed_D, signal, paused).weights_D
    assert abs(weights_D.sum() - 1) <= TINY and (weights_D >= 0).all()
    assert (weights_D[paused] == 0).all()
    left_D = rows_left(guardrails, signal)
    assert (weights_D * ROWS <= left_D + 1e-9).all()
    scarce_D = left_D < ROWS
    assert (weights_D[scarce_D] * ROWS <= np.maximum(left_D[scarce_D] - 1, 0) + 1e-9).all()


@checked
@given(situations())
def test_all_at_once_the_floor_gives_way_to_pauses_and_caps_only(situation):
    guardrails, old_D, proposed_D, signal, paused = situation
    weights_D = apply(guardrails, old_D, proposed_D, signal, paused).weights_D
    most_D = np.maximum(rows_left(guardrails, signal) - 1, 0) / ROWS
    most_D[paused] = 0
    assert (weights_D >= np.minimum(guardrails.floor, most_D) - TINY).all()


@checked
@given(situations(), st.randoms(use_true_random=False))
def test_all_at_once_permuting_sources_permutes_the_result(situation, random):
    guardrails, old_D, proposed_D, signal, paused = situation
    order = list(range(len(old_D)))
    random.shuffle(order)
    permuted = apply(
        replace(guardrails, max_epochs_D=guardrails.max_epochs_D[order], prior_D=guardrails.prior_D[order]),
        old_D[order],
        proposed_D[order],
        replace(signal, size_D=signal.size_D[order], drawn_D=signal.drawn_D[order]),
        [order.index(index) for index in paused],
    )
    expected = apply(guardrails, old_D, proposed_D, signal, paused)
    np.testing.assert_allclose(permuted.weights_D, expected.weights_D[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("min_entropy", [0.9, 1 - 1e-6, 1 - 1e-12, 1 - 1e-15, 1.0])
@pytest.mark.parametrize("number", [2, 3, 9, 40])
def test_the_order_of_sources_does_not_matter_where_an_even_mix_is_wanted(min_entropy, number):
    """Entropy is flat there: compared as such, it would tell weights to 1e-8 only."""
    rng = np.random.default_rng(number)
    guardrails = Guardrails(min_entropy=min_entropy)
    for _ in range(20):
        old_D, proposed_D = (normalise_weights(rng.uniform(0.001, 1, number)) for _ in range(2))
        order = rng.permutation(number)
        expected_D = apply(guardrails, old_D, proposed_D).weights_D
        permuted_D = apply(guardrails, old_D[order], proposed_D[order]).weights_D
        np.testing.assert_allclose(permuted_D, expected_D[order], rtol=0, atol=1e-14)
        assert unevenness(expected_D) <= (1 - min_entropy) * math.log(number) + 1e-14
        assert unevenness(expected_D) == pytest.approx(math.log(number) - entropy(expected_D), abs=1e-14)


@checked
@given(mixes())
def test_off_is_a_pass_through_of_the_same_bits(mix):
    guarded = apply(Guardrails(), *mix)
    assert guarded.weights_D.tobytes() == mix[1].tobytes() and guarded.events == ()


@checked
@given(mixes())
def test_limits_that_are_kept_already_change_no_bit(mix):
    old_D, proposed_D = mix
    wide = Guardrails(
        floor=min(old_D.min(), proposed_D.min()),
        max_kl_step=kl_divergence(proposed_D, old_D) + 1e-9,
        min_entropy=0.999 * min(entropy(old_D), entropy(proposed_D)) / math.log(len(old_D)),
        max_epochs_D=np.full(len(old_D), math.inf),
    )
    guarded = apply(wide, old_D, proposed_D)
    assert guarded.weights_D.tobytes() == proposed_D.tobytes() and guarded.events == ()


@checked
@given(mixes(), st.floats(0, 1))
def test_floor_is_kept_and_what_is_above_shares_the_rest_by_weight(mix, share):
    old_D, proposed_D = mix
    floor = share / len(old_D)
    weights_D = apply(Guardrails(floor=floor), old_D, proposed_D).weights_D
    assert (weights_D >= floor).all()
    above = weights_D > floor + TINY
    scale = weights_D[above] / proposed_D[above]
    np.testing.assert_allclose(scale, scale.mean() if above.any() else scale, rtol=1e-9)


@checked
@given(mixes(), st.floats(1e-6, 1))
def test_kl_step_is_kept_and_used_up_to_1e_12(mix, limit):
    old_D, proposed_D = mix
    weights_D = apply(Guardrails(max_kl_step=limit), old_D, proposed_D).weights_D
    whole = kl_divergence(proposed_D, old_D)
    reached = kl_divergence(weights_D, old_D)
    assert reached <= limit
    assert reached >= min(whole, limit) - 1e-12
    assert abs(weights_D.sum() - 1) <= TINY


@checked
@given(mixes(), st.floats(0, 1), st.floats(1e-3, 1))
def test_entropy_is_kept_also_when_the_step_is_shortened(mix, share, limit):
    old_D, proposed_D = mix
    needed = share * math.log(len(old_D))
    for guardrails in (Guardrails(min_entropy=share), Guardrails(min_entropy=share, max_kl_step=limit)):
        assert entropy(apply(guardrails, old_D, proposed_D).weights_D) >= needed - 1e-11


@checked
@given(mixes(), st.floats(0, 1))
def test_prior_pull_is_a_weighted_mean(mix, pull):
    old_D, proposed_D = mix
    prior_D = np.full(len(old_D), 1 / len(old_D))
    weights_D = apply(Guardrails(prior_D=prior_D, prior_pull=pull), old_D, proposed_D).weights_D
    np.testing.assert_allclose(weights_D, (1 - pull) * proposed_D + pull * prior_D, rtol=0, atol=1e-15)


@checked
@given(mixes(), st.data())
def test_fit_shares_solves_the_water_filling(mix, data):
    weights_D, other_D = mix
    least_D = other_D * data.draw(st.floats(0, 1))
    most_D = np.minimum(least_D + data.draw(st.floats(0, 1)), 1)
    most_D = np.where(most_D.sum() < 1, np.maximum(most_D, other_D), most_D)
    fitted_D = fit_shares(weights_D, least_D, most_D)
    assert abs(fitted_D.sum() - 1) <= 1e-9
    assert (fitted_D >= least_D - TINY).all() and (fitted_D <= most_D + TINY).all()
    ratio_D = fitted_D / weights_D
    inside = (fitted_D > least_D + 1e-9) & (fitted_D < most_D - 1e-9)
    if inside.any():
        level = ratio_D[inside].mean()
        np.testing.assert_allclose(ratio_D[inside], level, rtol=1e-6)
        at_least, at_most = fitted_D <= least_D + 1e-9, fitted_D >= most_D - 1e-9
        assert (level * weights_D[at_least] <= most_D[at_least] + 1e-6).all()
        assert (level * weights_D[at_most] >= least_D[at_most] - 1e-6).all()


def test_sources_without_weight_share_equally_what_the_others_cannot_take():
    fitted_D = fit_shares(np.array([1.0, 0, 0]), np.zeros(3), np.array([0.4, 1, 1]))
    np.testing.assert_allclose(fitted_D, [0.4, 0.3, 0.3], atol=1e-15)


def test_a_used_up_source_is_drawn_no_more_and_the_others_take_its_share_by_weight():
    signal = Signal(size_D=np.array([50, 900, 900]), drawn_D=np.array([100, 0, 0]), interval_rows=100)
    guardrails = Guardrails(max_epochs_D=[2, math.inf, math.inf])
    guarded = apply(guardrails, [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], signal)
    np.testing.assert_allclose(guarded.weights_D, [0, 0.6, 0.4], atol=1e-15)
    assert guarded.events == (Remark("max_epochs", "max_epochs: s0 at 2.00 of 2 epochs, drawn no more"),)


def test_a_nearly_used_up_source_gives_what_it_has_less_a_row_for_rounding():
    signal = Signal(size_D=np.array([50, 900, 900]), drawn_D=np.array([79, 0, 0]), interval_rows=100)
    guarded = apply(Guardrails(max_epochs_D=[2, 9, math.inf]), [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], signal)
    np.testing.assert_allclose(guarded.weights_D, [0.2, 0.48, 0.32], atol=1e-15)


def test_sources_that_are_exactly_enough_are_used_up_to_the_last_row():
    signal = Signal(size_D=np.array([30, 70]), drawn_D=np.array([0, 0]), interval_rows=100)
    guarded = apply(Guardrails(max_epochs_D=[1, 1]), [0.5, 0.5], [0.5, 0.5], signal)
    np.testing.assert_allclose(guarded.weights_D, [0.3, 0.7], atol=1e-15)


def test_the_last_update_of_a_run_needs_no_rows():
    signal = Signal(size_D=np.array([30, 70]), drawn_D=np.array([30, 70]), interval_rows=0)
    guarded = apply(Guardrails(max_epochs_D=[1, 1]), [0.5, 0.5], [0.4, 0.6], signal)
    assert guarded.weights_D.tolist() == [0.4, 0.6]


def test_a_pause_is_not_held_up_by_the_kl_limit():
    guarded = apply(Guardrails(max_kl_step=0.01), [0.6, 0.2, 0.2], [0.6, 0.2, 0.2], paused=[0])
    assert guarded.weights_D.tolist() == [0, 0.5, 0.5]


def test_what_comes_back_from_0_takes_no_more_than_its_withdrawal_would_be_worth():
    guarded = apply(Guardrails(max_kl_step=0.1), [0.0, 0.5, 0.5], [0.8, 0.1, 0.1])
    first = -math.expm1(-0.1)
    assert "s0 back from 0" in guarded.events[0].text
    start_D = np.array([first, (1 - first) / 2, (1 - first) / 2])
    assert kl_divergence(guarded.weights_D, start_D) == pytest.approx(0.1, abs=1e-12)
    assert guarded.weights_D[0] > first


def test_weights_in_force_below_the_floor_are_raised_though_the_step_is_limited():
    guarded = apply(Guardrails(floor=0.1, max_kl_step=1e-6), [0.01, 0.49, 0.5], [0.01, 0.4, 0.59])
    assert guarded.weights_D.min() >= 0.1
    assert [event.kind for event in guarded.events] == ["floor", "kl_step"]


def test_events_name_what_happened():
    everything = Guardrails(floor=0.05, max_kl_step=0.01, min_entropy=0.9)
    guarded = apply(everything, [0.4, 0.3, 0.3], [0.01, 0.01, 0.98])
    assert guarded.events[0] == Remark("floor", "floor: s0, s1 raised to 0.05")
    assert guarded.events[1].text.startswith("entropy: 0.3944 nats proposed, at least 0.9888 wanted")
    assert [event.kind for event in guarded.events] == ["floor", "entropy", "kl_step"]
    assert guarded.events[2].text.endswith("shortened to 0.01")


def test_entropy_is_measured_against_the_sources_that_may_be_drawn():
    guarded = apply(Guardrails(min_entropy=1.0), [0.4, 0.3, 0.3], [0.2, 0.2, 0.6], paused=[0])
    np.testing.assert_allclose(guarded.weights_D, [0, 0.5, 0.5], atol=1e-6)


def test_caps_may_leave_the_mix_less_even_than_wanted_and_say_so():
    signal = Signal(size_D=np.array([11, 900, 900]), drawn_D=np.array([0, 0, 0]), interval_rows=100)
    guarded = apply(
        Guardrails(min_entropy=1.0, max_epochs_D=[1, math.inf, math.inf]),
        [1 / 3] * 3,
        [0.1, 0.8, 0.1],
        signal,
    )
    np.testing.assert_allclose(guarded.weights_D, [0.1, 0.45, 0.45], atol=1e-9)
    assert guarded.events[-1].text.endswith("as even as caps allow")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"floor": -0.1}, "floor"),
        ({"floor": math.nan}, "floor"),
        ({"max_kl_step": 0.0}, "max_kl_step"),
        ({"max_kl_step": math.nan}, "max_kl_step"),
        ({"min_entropy": 1.1}, "min_entropy"),
        ({"prior_pull": 2.0}, "prior_pull"),
        ({"prior_pull": 0.5}, "needs a prior"),
    ],
)
def test_refused_when_made(options, problem):
    with pytest.raises(ValueError, match=problem):
        Guardrails(**options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"floor": 0.4}, "adds up to 1.2"),
        ({"prior_D": [0.5, 0.5]}, "prior: "),
        ({"prior_D": [0.5, 0.5, 0.5]}, "prior: "),
        ({"max_epochs_D": [1, 2]}, "max_epochs"),
        ({"max_epochs_D": [1, 2, 0]}, "max_epochs"),
        ({"max_epochs_D": [1, 2, math.nan]}, "max_epochs"),
    ],
)
def test_refused_for_three_sources(options, problem):
    with pytest.raises(ValueError, match=problem):
        Guardrails(**options).check(3)


def test_refused_when_nothing_is_left_to_draw():
    with pytest.raises(ValueError, match="all of s0, s1 are paused"):
        apply(Guardrails(), [0.5, 0.5], [0.5, 0.5], paused=[0, 1])
    capped = Guardrails(max_epochs_D=[1, 1])
    signal = Signal(size_D=np.array([30, 70]), drawn_D=np.array([30, 10]), interval_rows=100)
    with pytest.raises(ValueError, match=r"leaves 60 rows .* draws 100"):
        apply(capped, [0.5, 0.5], [0.5, 0.5], signal)
    with pytest.raises(ValueError, match="needs the sources' sizes"):
        apply(capped, [0.5, 0.5], [0.5, 0.5])
