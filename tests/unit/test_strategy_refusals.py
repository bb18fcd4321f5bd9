"""What strategies refuse, and what is said then; a user's own strategies."""

import inspect
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import get_type_hints

import numpy as np
import pytest
from strategy_fixtures import NAMES, later, options_for, signal_for, strategy_for, uniform

from megatron_dynmix.mixing.strategies import STRATEGIES, build_strategy
from megatron_dynmix.mixing.strategies.ado import MAX_POINTS, Ado, fit
from megatron_dynmix.mixing.strategies.losses import OnlineDataMixing, RefLoss
from megatron_dynmix.mixing.strategies.planned import UniMax
from megatron_dynmix.mixing.strategy import Proposal, Signal, Strategy

NEED_LOSS = [name for name in NAMES if STRATEGIES[name].needs_loss]


def changed(signal, **values):
    return Signal(**{**vars(signal), **values})


@pytest.mark.parametrize("name", NEED_LOSS)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "needs a loss per source"),
        ([1.0, np.nan, 1.0, 1.0], r"source 1 \(counted from 0\) has the loss nan"),
        ([1.0, 1.0, np.inf, 1.0], r"source 2 .* has the loss inf"),
        ([1.0, 1.0, 1.0, -0.1], r"source 3 .* has the loss -0.1"),
        ([1.0, 1.0], "losses have shape .2,."),
    ],
)
def test_a_loss_that_is_not_there_is_refused(name, loss, message):
    rng = np.random.default_rng(0)
    signal = changed(signal_for(4, rng), loss_D=None if loss is None else np.array(loss))
    with pytest.raises(ValueError, match=message) as refused:
        strategy_for(name, 4, rng).propose(uniform(4), signal, {})
    assert name in str(refused.value)


@pytest.mark.parametrize("name", ["data-size", "temperature", "unimax", "ado"])
@pytest.mark.parametrize("size", [None, [1, 2], [1, 2, 0, 4]])
def test_sizes_that_are_not_there_are_refused(name, size):
    rng = np.random.default_rng(0)
    signal = changed(signal_for(4, rng), size_D=None if size is None else np.array(size))
    with pytest.raises(ValueError, match=f"{name} mixing needs the size of every source in rows"):
        strategy_for(name, 4, rng).propose(uniform(4), signal, {})


def test_unimax_refuses_a_run_that_is_longer_than_its_epochs():
    signal = Signal(size_D=np.array([100, 300]), run_rows=1000)
    with pytest.raises(ValueError, match=r"draws 1000 rows, 1 epochs .* only 400; set epoch_cap to .* 2.5"):
        UniMax().propose(uniform(2), signal, {})
    kept_D = UniMax(epoch_cap=2.5).propose(uniform(2), signal, {}).weights_D
    assert kept_D.tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="rows that the whole run draws"):
        UniMax().propose(uniform(2), Signal(size_D=np.array([100, 300])), {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("temperature", {"temperature": 0}, "temperature 0 is unusable"),
        ("temperature", {"sizes_D": [1, 0]}, "size of source 1 .* is 0; give a number > 0"),
        ("data-size", {"sizes_D": [1, float("inf")]}, "size of source 1 .* is inf"),
        ("data-size", {"sizes_D": [-1, 1]}, "size of source 0 .* is -1"),
        ("loss-softmax", {"temperature": float("nan")}, "temperature nan is unusable"),
        ("unimax", {"epoch_cap": -1}, "epoch_cap -1"),
        ("sequential", {"every": 0}, "every 0"),
        ("ref-loss", {"reference_D": [-100, 0.02, 0.02, 0.02]}, "reference loss of source 0 .* is -100"),
        ("ref-loss", {"reference_D": [1, float("nan")]}, "reference loss of source 1 .* is nan"),
        ("ref-loss", {"reference_D": {"code": 1.0}}, "not a list of numbers"),
        ("ref-loss", {"reference_D": [1.0], "max_gap": 0}, "max_gap 0"),
        ("ref-loss", {"reference_D": [1.0], "eta": -1}, "eta -1"),
        ("ref-loss", {}, "missing a required .*argument: 'reference_D'"),
        ("sheared", {"target_D": [1.0], "smoothing": 2}, "smoothing 2"),
        ("odm", {"variant": "exp4"}, "variant 'exp4' is unknown"),
        ("odm", {"decay": 1}, "decay 1"),
        ("ado", {"warmup": 1.5}, "warmup 1.5"),
        ("balanced", {"metric": "l3"}, "metric 'l3' is unknown"),
        ("balanced", {"layers": []}, "layers"),
        ("sent-emb", {"embeddings_DV": [[1.0, 2.0], [1.0]]}, "of one length"),
        ("sent-emb", {"embeddings_DV": [[1.0, float("nan")]]}, "finite vector"),
        ("sent-emb", {"embeddings_DV": [[1.0]], "metric": "js"}, "metric 'js' cannot compare embeddings"),
        ("final-static", {"weights_D": [0, 0]}, "at least one must be > 0"),
        ("final-static", {"weights_D": {"code": 1}}, "not a list of numbers"),
        ("schedule", {"points": []}, "has no points"),
        ("schedule", {"points": [[100, [1, 1]]]}, "first point of the schedule is at iteration 100"),
        ("schedule", {"points": [[0, [1, 1]], [0, [1, 2]]]}, "iterations must rise"),
        ("schedule", {"points": [[0, [1, 1]], [1, [1]]]}, "different numbers of sources"),
        ("schedule", {"points": [[0, [1, -1]]]}, "schedule at iteration 0: .*negative"),
        ("schedule", {"points": [[0, {"code": 1}]]}, "schedule at iteration 0: .*not a list of numbers"),
        ("schedule", {"points": [[0]]}, "not \\[iteration, weights\\]"),
        ("schedule", {"points": [0, 1]}, "not \\[iteration, weights\\]"),
        ("schedule", {"points": [[0, [1, 1]]], "interpolation": "cubic"}, "interpolation 'cubic'"),
    ],
)
def test_an_option_out_of_range_is_refused_at_the_start(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_strategy(name, options)


def test_sizes_for_other_sources_are_refused():
    for name in ("data-size", "temperature"):
        strategy = build_strategy(name, {"sizes_D": [1, 2, 3]})
        with pytest.raises(ValueError, match="3 sizes for 4 sources"):
            strategy.propose(uniform(4), Signal(), {})


@pytest.mark.parametrize("name", ["final-static", "sent-emb", "schedule", "ref-loss", "sheared"])
def test_options_for_other_sources_are_refused(name):
    rng = np.random.default_rng(0)
    strategy = build_strategy(name, options_for(name, 3, rng))
    with pytest.raises(ValueError, match=r"3 .*4"):
        strategy.propose(uniform(4), signal_for(4, rng), {})


def test_a_reference_that_is_nonsense_is_refused_by_its_source():
    strategy = RefLoss(reference_D=[1.0, 50.0])
    with pytest.raises(ValueError, match=r"reference loss of source 1 .* is 50.0.*more than 10 nats apart"):
        strategy.propose(uniform(2), Signal(loss_D=np.array([1.0, 2.0])), {})
    RefLoss(reference_D=[1.0, 50.0], max_gap=48).propose(uniform(2), Signal(loss_D=np.array([1.0, 2.0])), {})


def test_an_option_has_one_type_in_all_strategies():
    types = {}
    for kind in STRATEGIES.values():
        hints = get_type_hints(kind)
        for option in inspect.signature(kind).parameters:
            assert types.setdefault(option, hints[option]) == hints[option], f"{option} of {kind.name}"
    assert types["eta"] is float
    assert types["every"] is int


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gate-laod", {}, "did you mean gate-load"),
        ("ref-loss", {"reference_D": [1.0], "smothing": 0.1}, "no option 'smothing'; did you mean smoothing"),
        ("uniform", {"eta": 1}, "no option 'eta'.*it has none"),
        ("sequential", {"every": "often"}, "cannot be made with the options"),
        ("own_rules:Missing", {}, "AttributeError"),
        ("no_such_module:Rule", {}, "ModuleNotFoundError"),
        ("own_rules:number", {}, "neither a class nor a function"),
        ("own_rules:even", {"eta": 1}, "function and has no options"),
        ("own_rules:Half", {}, "lacks needs_gate_load, needs_loss, starts, updates"),
        ("own_rules:Nameless", {}, "lacks name;"),
        ("own_rules:Ruleless", {}, "lacks a propose that can be called"),
        ("own_rules:Plain", {"powr": 2}, "no option 'powr'; did you mean power"),
        ("own_rules:Plain", {}, "missing a required argument: 'power'"),
        ("own_rules:Fails", {}, "own_rules:Fails cannot be made .*KeyError: 'no table'"),
    ],
)
def test_names_and_own_strategies_that_cannot_be_used(own_rules, name, options, message):
    with pytest.raises(ValueError, match=message):
        build_strategy(name, options)


class Plain:
    """A user's strategy that is no dataclass."""

    name = "plain"
    needs_gate_load = needs_loss = starts = False
    updates = True

    def __init__(self, power, scale=1.0):
        self.power, self.scale = power, scale

    def propose(self, weights_D, signal, state):
        new_D = weights_D**self.power
        return Proposal(weights_D=new_D / new_D.sum(), delta_D=np.zeros(len(weights_D)))


class Fails(Plain):
    def __init__(self):
        raise KeyError("no table")


class Half:
    name = "half"

    def propose(self, weights_D, signal, state):
        raise AssertionError("a strategy without all parts must not be asked")


class Based(Strategy):
    """A user's strategy that takes the defaults of the base class."""

    name = "based"

    def propose(self, weights_D, signal, state):
        return Proposal(weights_D=weights_D, delta_D=np.zeros(len(weights_D)))


class Nameless(Strategy):
    def propose(self, weights_D, signal, state):
        raise AssertionError("a strategy without all parts must not be asked")


class Ruleless(Strategy):
    name = "ruleless"


@dataclass
class Anything(Plain):
    power: float = 0.0

    def __init__(self, **options):
        super().__init__(**options)


@pytest.fixture
def own_rules(monkeypatch):
    module = ModuleType("own_rules")
    module.Plain, module.Half, module.Anything, module.number = Plain, Half, Anything, 3
    module.Fails, module.Based, module.Nameless, module.Ruleless = Fails, Based, Nameless, Ruleless
    module.even = lambda weights_D, signal: np.full(len(weights_D), 1 / len(weights_D))
    module.words = lambda weights_D, signal: {"code": 1}
    monkeypatch.setitem(sys.modules, "own_rules", module)


def test_own_strategies_are_built_with_their_options(own_rules):
    before_D = np.array([0.6, 0.3, 0.1])
    for name in ("own_rules:Plain", "own_rules:Anything"):
        plain = build_strategy(name, {"power": 0.0})
        assert plain.propose(before_D, Signal(), {}).weights_D.tolist() == uniform(3).tolist()
    assert (plain.layers, plain.needs_halves, plain.updates) == ("all", False, True)
    based = build_strategy("own_rules:Based", {})
    assert isinstance(based, Based) and based.updates and not (based.starts or based.needs_gate_load)
    even = build_strategy("own_rules:even", {})
    assert even.propose(before_D, Signal(), {}).weights_D.tolist() == uniform(3).tolist()
    with pytest.raises(ValueError, match="give one number per source"):
        build_strategy("own_rules:words", {}).propose(before_D, Signal(), {})


def test_odm_keeps_the_weights_and_counts_nothing_until_warm():
    before_D = np.array([0.6, 0.3, 0.1])
    strategy = OnlineDataMixing(warmup=0.1)
    cold = Signal(loss_D=np.array([3.0, 1.0, 1.0]), iteration=99, train_iters=1000)
    assert strategy.propose(before_D, cold, {}).weights_D.tolist() == before_D.tolist()
    assert strategy.propose(before_D, cold, {}).state == {}
    warm = strategy.propose(before_D, changed(cold, iteration=100), {})
    assert warm.weights_D[0] > warm.weights_D[1] == warm.weights_D[2]


def test_odm_refuses_to_tell_its_exploration_without_an_iteration():
    with pytest.raises(ValueError, match="odm mixing needs the iterations done"):
        OnlineDataMixing().propose(uniform(3), Signal(loss_D=np.array([3.0, 1.0, 1.0])), {})


def test_odm_survives_a_loss_whose_perplexity_overflows():
    signal = Signal(loss_D=np.array([800.0, 1.0, 1.0]), iteration=10**6)
    assert OnlineDataMixing(warmup=0).propose(uniform(3), signal, {}).weights_D[0] > 0.99


def test_odm_counts_anew_after_a_change_of_variant():
    signal = Signal(loss_D=np.array([3.0, 1.0, 2.0]), iteration=100)
    smoothed, exp3 = OnlineDataMixing(warmup=0), OnlineDataMixing(warmup=0, variant="exp3")
    state = smoothed.propose(uniform(3), signal, {}).state
    assert exp3.propose(uniform(3), signal, state).state == exp3.propose(uniform(3), signal, {}).state


def test_exp3_gives_a_paused_source_no_reward():
    strategy = OnlineDataMixing(variant="exp3", warmup=0)
    signal = Signal(loss_D=np.array([3.0, 1.0, 1.0]), iteration=100)
    proposal = strategy.propose(np.array([0.0, 0.5, 0.5]), signal, {})
    assert proposal.state["rewards"] == [0, 0.2, 0.2]


def test_ado_proposes_the_sizes_until_it_is_warm_and_knows_five_losses():
    rng = np.random.default_rng(0)
    strategy, state = Ado(warmup=0.3), {}
    signal = changed(signal_for(4, rng, iteration=100), train_iters=1000)
    prior_D = signal.size_D / signal.size_D.sum()
    for iteration in range(100, 1000, 100):
        proposal = strategy.propose(uniform(4), changed(signal, iteration=iteration), state)
        state = proposal.state
        is_prior = np.allclose(proposal.weights_D, prior_D, rtol=0, atol=1e-12)
        assert is_prior == (iteration < 700), iteration
        signal = later(signal, rng)


def test_ado_falls_back_to_the_sizes_where_no_loss_falls():
    rng = np.random.default_rng(0)
    strategy, state = Ado(warmup=0), {}
    signal = signal_for(4, rng)
    for rising in range(8):
        signal = changed(later(signal, rng), loss_D=np.array([1.0, 2.0, 0.5, 1.5]) + rising)
        proposal = strategy.propose(uniform(4), signal, state)
        state = proposal.state
    np.testing.assert_allclose(proposal.weights_D, signal.size_D / signal.size_D.sum(), rtol=0, atol=1e-12)


def test_ado_keeps_a_short_history_that_spans_the_run():
    strategy, state = Ado(warmup=0), {}
    drawn_D = np.array([0, 0])
    for iteration in range(1, 300):
        drawn_D = drawn_D + 10
        signal = Signal(
            loss_D=1 + drawn_D**-0.3,
            iteration=iteration,
            train_iters=600,
            size_D=np.array([9, 9]),
            drawn_D=drawn_D,
        )
        state = strategy.propose(uniform(2), signal, state).state
        assert len(state["history"]) < MAX_POINTS
    rows = [point[0] for point in state["history"]]
    assert len(set(np.diff(rows))) == 1
    assert rows[0] <= 20 * 8
    assert rows[-1] >= 20 * (299 - 8)


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_no_worse_than_the_true_law(seed):
    rng = np.random.default_rng(seed)
    n_T = np.arange(1, 41) * 1000.0
    floor, drop, exponent = rng.uniform(0.2, 2), rng.uniform(0.5, 3), rng.uniform(0.1, 0.7)
    true_T = floor + drop * (n_T / n_T[-1]) ** -exponent
    loss_T = true_T * rng.lognormal(0, 0.01, 40)
    law = fit(n_T, loss_T[:, None])
    fitted_T = law.floor_D + law.drop_D * (n_T / law.n_last) ** -law.exponent_D

    def huber(residual_T):
        size_T = np.abs(residual_T)
        return np.where(size_T > 1e-3, 1e-3 * (size_T - 5e-4), size_T**2 / 2).sum()

    assert huber(np.log(fitted_T / loss_T)) <= huber(np.log(true_T / loss_T)) * 1.001
    np.testing.assert_allclose(fitted_T, true_T, rtol=0.02)


def test_the_fit_shrugs_off_an_outlier():
    n_T = np.arange(1, 31) * 1000.0
    loss_T = 1 + 2 * (n_T / n_T[-1]) ** -0.3
    spoilt_T = loss_T.copy()
    spoilt_T[15] *= 3
    law, spoilt = fit(n_T, loss_T[:, None]), fit(n_T, spoilt_T[:, None])
    np.testing.assert_allclose(spoilt.slope_D(), law.slope_D(), rtol=0.05)


def test_strategies_are_found_in_the_files_of_their_families_in_this_order():
    assert list(STRATEGIES) == [
        *("gate-load", "inverse", "balanced", "uniform", "fixed", "final-static", "data-size", "temperature"),
        *("unimax", "sent-emb", "schedule", "sequential", "random", "random-batch", "ref-loss", "sheared"),
        *("loss-softmax", "odm", "ado", "match-load", "uniqueness"),
    ]
    assert all(kind.name == name for name, kind in STRATEGIES.items())
