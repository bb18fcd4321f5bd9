"""The controller adopts sound proposals only, remembers counts, and resumes bit for bit."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from megatron_dynmix.mixing.controller import ControllerState, MixingController
from megatron_dynmix.mixing.guardrails import Guardrails, Override
from megatron_dynmix.mixing.strategies.gate_load import GateLoad
from megatron_dynmix.mixing.strategies.planned import Fixed
from megatron_dynmix.mixing.strategy import Proposal, Remark, Signal, Strategy

SOURCES = ("code", "math", "chat")
THIRDS_D = np.full(3, 1 / 3)
COUNTS_DLE = np.array([[[9, 1, 2]], [[3, 4, 5]], [[4, 4, 4]]])


@dataclass
class Scripted(Strategy):
    """Proposes whatever the test says, from no signal."""

    proposal: Proposal
    name: str = "scripted"

    def propose(self, weights_D, signal, state: object):
        return self.proposal


def without(counts_DLE, dataset_id):
    counts_DLE = counts_DLE.copy()
    counts_DLE[dataset_id] = 0
    return counts_DLE


def test_update_adopts_the_proposal():
    controller = MixingController(SOURCES, THIRDS_D, GateLoad())
    decision = controller.update(Signal(counts_DLE=COUNTS_DLE))
    assert decision.notes == () and decision.events == ()
    assert controller.weights_D.tolist() == decision.proposal.weights_D.tolist() != THIRDS_D.tolist()
    assert decision.weights_D is controller.weights_D
    assert controller.weights_D[0] == controller.weights_D.max()


def test_weights_cannot_be_changed_from_outside():
    weights_D = THIRDS_D.copy()
    controller = MixingController(SOURCES, weights_D, Fixed())
    weights_D[0] = 9
    assert controller.weights_D[0] == 1 / 3
    with pytest.raises(ValueError, match="read-only"):
        controller.weights_D[0] = 9


@pytest.mark.parametrize(
    "proposal",
    [
        Proposal(np.array([np.nan, 0.5, 0.5]), np.zeros(3)),
        Proposal(np.array([np.inf, 0.5, 0.5]), np.zeros(3)),
        Proposal(np.array([-0.5, 1.0, 0.5]), np.zeros(3)),
        Proposal(np.array([0.5, 0.5]), np.zeros(2)),
        Proposal(np.array([0.5, 0.25, 0.25 + 2e-9]), np.zeros(3)),
        Proposal(np.array([0.5, 0.25, 0.25]), np.array([0, np.nan, 0])),
        Proposal(np.array([0.5, 0.25, 0.25]), np.zeros(2)),
        Proposal(np.array([0.5, 0.25, 0.25]), np.zeros(3), load_DLE=np.full((3, 1, 2), np.nan)),
        Proposal(np.array([0.5, 0.25, 0.25]), np.zeros(3), distance_DD=np.full((3, 3), np.inf)),
        Proposal(np.array([0.5, 0.25, 0.25]), [0, 0]),
        Proposal(np.array([0.5, 0.25, 0.25]), np.zeros(3), state={"seen": np.zeros(3)}),
        Proposal(np.array([0.5, 0.25, 0.25]), np.zeros(3), state={"best": np.nan}),
        Proposal(np.array([0.5, 0.25, 0.25]), np.zeros(3), state={0: "comes back as text"}),
        np.array([0.5, 0.25, 0.25]),
    ],
)
def test_a_broken_proposal_is_refused_and_the_weights_stay(proposal):
    controller = MixingController(SOURCES, THIRDS_D, Scripted(proposal))
    with pytest.raises(ValueError):
        controller.update(Signal())
    assert controller.weights_D.tolist() == THIRDS_D.tolist()


def test_a_proposal_may_hold_lists():
    controller = MixingController(SOURCES, THIRDS_D, Scripted(Proposal([0.5, 0.25, 0.25], [1, 2, 3])))
    decision = controller.update(Signal())
    assert decision.weights_D.tolist() == [0.5, 0.25, 0.25]
    assert decision.proposal.delta_D.tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_broken_counts_are_refused_by_name_and_not_remembered(value):
    controller = MixingController(SOURCES, THIRDS_D, GateLoad())
    broken_DLE = without(COUNTS_DLE.astype(float), 0)
    broken_DLE[1, 0, 0] = value
    before = controller.state.to_json()
    with pytest.raises(ValueError, match="'math'"):
        controller.update(Signal(counts_DLE=broken_DLE))
    assert controller.state.to_json() == before


def test_missing_or_misshapen_counts_are_refused():
    controller = MixingController(SOURCES, THIRDS_D, GateLoad())
    with pytest.raises(ValueError, match="holds none"):
        controller.update(Signal())
    with pytest.raises(ValueError, match="3 sources"):
        controller.update(Signal(counts_DLE=COUNTS_DLE[:2]))
    controller.update(Signal(counts_DLE=COUNTS_DLE))
    with pytest.raises(ValueError, match=r"'math'.*same model"):
        controller.update(Signal(counts_DLE=without(np.ones((3, 2, 3), int), 1)))


def test_a_source_that_was_not_drawn_uses_its_last_counts():
    seen = MixingController(SOURCES, THIRDS_D, GateLoad())
    unseen = MixingController(SOURCES, THIRDS_D, GateLoad())
    for controller in (seen, unseen):
        controller.update(Signal(counts_DLE=COUNTS_DLE))
    decision_seen = seen.update(Signal(counts_DLE=COUNTS_DLE))
    decision_unseen = unseen.update(Signal(counts_DLE=without(COUNTS_DLE, 1)))
    assert decision_seen.notes == ()
    assert decision_unseen.notes == (
        Remark("last_known", "no tokens in this interval, last known counts used: math"),
    )
    np.testing.assert_array_equal(decision_unseen.signal.counts_DLE, COUNTS_DLE)
    assert unseen.state.to_json() == seen.state.to_json()


def test_weights_are_kept_until_every_source_was_measured():
    controller = MixingController(SOURCES, THIRDS_D, GateLoad())
    decision = controller.update(Signal(counts_DLE=without(COUNTS_DLE, 2)))
    proposal = decision.proposal
    assert decision.notes == (Remark("kept", "weights kept: no tokens measured yet from chat"),)
    assert not decision.signal.counts_DLE[2].any()
    assert controller.weights_D.tolist() == proposal.weights_D.tolist() == THIRDS_D.tolist()
    assert proposal.delta_D.tolist() == [0, 0, 0] and proposal.load_DLE is None

    # The rows of that first interval were remembered: chat alone completes the picture.
    only_chat_DLE = without(without(COUNTS_DLE, 0), 1)
    (note,) = controller.update(Signal(counts_DLE=only_chat_DLE)).notes
    assert note.kind == "last_known" and "code, math" in note.text
    assert controller.weights_D.tolist() != THIRDS_D.tolist()


def test_state_survives_json_bit_for_bit():
    first = MixingController(SOURCES, THIRDS_D, GateLoad())
    first.update(Signal(counts_DLE=COUNTS_DLE))
    second = MixingController(SOURCES, THIRDS_D, GateLoad())
    second.resume(ControllerState.from_json(json.loads(json.dumps(first.state.to_json()))))
    assert second.state.to_json() == first.state.to_json()
    for controller in (first, second):
        controller.update(Signal(counts_DLE=without(COUNTS_DLE, 0)))
    assert second.weights_D.tobytes() == first.weights_D.tobytes()


@pytest.mark.parametrize(
    ("sources", "difference"),
    [
        (("code", "math", "law"), r"no longer there \['chat'\], new \['law'\]"),
        (("math", "code", "chat"), "order changed"),
    ],
)
def test_state_of_other_sources_is_refused(sources, difference):
    state = MixingController(SOURCES, THIRDS_D, Fixed()).state
    with pytest.raises(ValueError, match=difference):
        MixingController(sources, THIRDS_D, Fixed()).resume(state)


@pytest.mark.parametrize(
    "damage", [{"weights": [0.5, 0.5]}, {"weights": [0.5, 0.5, 0.5]}, {"last_counts": [None]}]
)
def test_damaged_state_is_refused(damage):
    saved = MixingController(SOURCES, THIRDS_D, Fixed()).state.to_json()
    with pytest.raises(ValueError):
        ControllerState.from_json(saved | damage)


def test_with_other_sources_what_is_known_of_unchanged_ones_stays_and_strategies_begin_again():
    controller = MixingController(SOURCES, THIRDS_D, ByLoss(), shadows={"s": GateLoad()})
    signal = Signal(counts_DLE=COUNTS_DLE, loss_D=np.array([1.0, 2.0, 5.0]))
    controller.update(signal, Override(pause=("math", "chat")))
    state = controller.state.with_sources(("chat", "law", "code"), (2, None, None), [0.5, 0.25, 0.25])
    assert state.sources == state.known.sources == ("chat", "law", "code")
    assert state.course.weights_D.tolist() == state.course.first_D.tolist() == [0.5, 0.25, 0.25]
    assert state.course.state == {} and state.shadows == {} and list(state.before_pause) == ["chat"]
    assert state.known.values["loss"] == (5.0, None, None)
    chat_LE, *others = state.known.values["tokens"]
    assert chat_LE.tolist() == COUNTS_DLE[2].tolist() and others == [None, None]


def test_another_strategy_begins_at_the_weights_in_force_and_remembers_nothing():
    controller = MixingController(SOURCES, THIRDS_D, ByLoss())
    controller.update(Signal(loss_D=np.array([1.0, 2.0, 5.0])))
    course = controller.state.with_new_strategy().course
    assert course.weights_D.tolist() == course.first_D.tolist() == [0.125, 0.25, 0.625]
    assert course.state == {} and controller.state.course.state == {"updates": 1}


@pytest.mark.parametrize(
    ("sources", "weights"),
    [((), []), (("a", "a"), [0.5, 0.5]), (("a", "b"), [1.0]), (("a", "b"), [1.0, 1.0])],
)
def test_controller_refusals(sources, weights):
    with pytest.raises(ValueError):
        MixingController(sources, np.array(weights), Fixed())


@dataclass
class ByLoss(Strategy):
    """Weights in proportion to the losses; counts its updates in its state."""

    name: str = "by-loss"
    needs_loss: bool = True

    def propose(self, weights_D, signal, state):
        assert np.isfinite(signal.loss_D).all()
        new_D = signal.loss_D / signal.loss_D.sum()
        return Proposal(new_D, np.zeros(len(new_D)), state={"updates": state.get("updates", 0) + 1})


@dataclass
class Starts(ByLoss):
    """Chooses its first weights, then rests."""

    needs_loss: bool = False
    starts: bool = True
    updates: bool = False

    def propose(self, weights_D, signal, state):
        assert signal.counts_DLE is None and not state
        return Proposal(np.array([0.7, 0.2, 0.1]), np.zeros(3))


class Broken(ByLoss):
    def propose(self, weights_D, signal, state):
        raise KeyError("no such thing")


def test_a_source_without_a_loss_uses_its_last_one():
    controller = MixingController(SOURCES, THIRDS_D, ByLoss())
    decision = controller.update(Signal(loss_D=np.array([1.0, 2.0, np.nan])))
    assert decision.notes == (Remark("kept", "weights kept: no loss measured yet from chat"),)
    assert controller.weights_D.tolist() == THIRDS_D.tolist() and decision.proposal.state == {}
    decision = controller.update(Signal(loss_D=np.array([np.nan, 2.0, 5.0])))
    assert decision.notes == (Remark("last_known", "no loss in this interval, last known losses used: code"),)
    assert decision.signal.loss_D.tolist() == [1, 2, 5]
    assert controller.weights_D.tolist() == [0.125, 0.25, 0.625]
    assert controller.state.to_json()["strategy"] == {"updates": 1}


@pytest.mark.parametrize("loss_D", [None, np.ones(2), np.array([1, np.inf, 1])])
def test_losses_that_cannot_be_used_are_refused(loss_D):
    controller = MixingController(SOURCES, THIRDS_D, ByLoss())
    before = controller.state.to_json()
    with pytest.raises(ValueError, match="loss"):
        controller.update(Signal(loss_D=loss_D))
    assert controller.state.to_json() == before


def test_what_must_be_measured_follows_from_strategy_and_shadows():
    plain = MixingController(SOURCES, THIRDS_D, Fixed())
    assert not (plain.updates or plain.needs_gate_load or plain.needs_loss or plain.needs_halves)
    watched = MixingController(SOURCES, THIRDS_D, Fixed(), shadows={"gate-load": GateLoad()})
    assert watched.updates and watched.needs_gate_load and not watched.needs_loss
    both = MixingController(SOURCES, THIRDS_D, GateLoad(), shadows={"by-loss": ByLoss()})
    assert both.needs_gate_load and both.needs_loss
    capped = MixingController(SOURCES, THIRDS_D, Fixed(), guardrails=Guardrails(max_epochs_D=[1, 2, 3]))
    assert capped.updates and not capped.needs_gate_load


def test_a_strategy_that_starts_chooses_the_first_weights_and_keeps_them():
    controller = MixingController(SOURCES, THIRDS_D, Starts())
    assert controller.start(Signal()).proposal.weights_D.tolist() == [0.7, 0.2, 0.1]
    controller.update(Signal(counts_DLE=COUNTS_DLE))
    assert controller.weights_D.tolist() == [0.7, 0.2, 0.1]


def test_the_first_weights_are_within_the_guardrails_but_for_the_step():
    guardrails = Guardrails(floor=0.15, max_kl_step=1e-9)
    controller = MixingController(SOURCES, THIRDS_D, Starts(), guardrails=guardrails)
    assert controller.start(Signal()).events == (Remark("floor", "floor: chat raised to 0.15"),)
    assert controller.weights_D.min() == 0.15
    given = MixingController(SOURCES, np.array([0.8, 0.1, 0.1]), GateLoad(), guardrails=guardrails)
    assert given.start(Signal()).proposal.weights_D.tolist() == [0.8, 0.1, 0.1]
    np.testing.assert_allclose(given.weights_D, [0.7, 0.15, 0.15], atol=1e-15)


def test_shadows_go_their_own_way_and_change_nothing():
    shadows = {"strong": GateLoad(eta=100), "by-loss": ByLoss(), "start": Starts()}
    watched = MixingController(SOURCES, THIRDS_D, GateLoad(), shadows=shadows)
    alone = MixingController(SOURCES, THIRDS_D, GateLoad())
    strong = MixingController(SOURCES, THIRDS_D, GateLoad(eta=100))
    watched.start(Signal()), alone.start(Signal()), strong.start(Signal())
    signal = Signal(counts_DLE=COUNTS_DLE, loss_D=np.array([1.0, 2.0, 5.0]))
    for _ in range(3):
        decision = watched.update(signal)
        alone.update(signal), strong.update(signal)
    assert watched.weights_D.tobytes() == alone.weights_D.tobytes()
    assert decision.shadow["strong"].weights_D.tobytes() == strong.weights_D.tobytes()
    assert decision.shadow["by-loss"].weights_D.tolist() == [0.125, 0.25, 0.625]
    assert decision.shadow["start"].weights_D.tolist() == [0.7, 0.2, 0.1]


def test_a_failing_shadow_is_noted_and_stops_nothing():
    shadows = {"bad": Broken(), "wild": Scripted(Proposal(np.ones(3), np.zeros(3)))}
    controller = MixingController(SOURCES, THIRDS_D, GateLoad(), shadows=shadows)
    decision = controller.update(Signal(counts_DLE=COUNTS_DLE, loss_D=np.ones(3)))
    bad, wild = decision.notes
    assert bad == Remark("shadow_failed", "shadow bad failed: 'no such thing'")
    assert wild.kind == "shadow_failed" and wild.text.startswith("shadow wild failed: weights")
    assert decision.shadow == {}
    assert controller.weights_D.tolist() != THIRDS_D.tolist()


def test_a_shadow_without_its_measurements_waits_and_the_weights_go_on():
    controller = MixingController(SOURCES, THIRDS_D, GateLoad(), shadows={"by-loss": ByLoss()})
    decision = controller.update(Signal(counts_DLE=COUNTS_DLE, loss_D=np.array([1.0, np.nan, 1.0])))
    assert decision.notes == (Remark("shadow_kept", "shadow weights kept: no loss measured yet from math"),)
    assert decision.shadow["by-loss"].weights_D.tolist() == THIRDS_D.tolist()
    assert controller.weights_D.tolist() != THIRDS_D.tolist()


def test_all_state_survives_json_bit_for_bit_with_shadows_and_losses():
    def new():
        shadows = {"strong": GateLoad(eta=100), "bad": Broken()}
        return MixingController(SOURCES, THIRDS_D, ByLoss(), shadows=shadows)

    first, second = new(), new()
    signal = Signal(counts_DLE=COUNTS_DLE, loss_D=np.array([0.1, 0.2, 0.7]))
    first.update(signal, Override(pause=("math",)))
    second.resume(ControllerState.from_json(json.loads(json.dumps(first.state.to_json()))))
    for controller in (first, second):
        controller.update(Signal(counts_DLE=without(COUNTS_DLE, 0), loss_D=np.array([np.nan, 0.5, np.nan])))
    assert second.state.to_json() == first.state.to_json()
    assert second.weights_D.tobytes() == first.weights_D.tobytes()


def test_a_shadow_that_the_saved_mix_did_not_have_begins_at_its_weights():
    first = MixingController(SOURCES, THIRDS_D, GateLoad())
    first.update(Signal(counts_DLE=COUNTS_DLE))
    second = MixingController(SOURCES, THIRDS_D, GateLoad(), shadows={"still": GateLoad(eta=0, smoothing=0)})
    second.resume(first.state)
    shadow = second.update(Signal(counts_DLE=COUNTS_DLE)).shadow["still"]
    np.testing.assert_allclose(shadow.weights_D, first.weights_D, atol=1e-15)


@pytest.mark.parametrize("failure", ["strategy", "guardrails"])
def test_the_last_good_weights_and_all_state_stay_after_a_refused_update(failure):
    guardrails = Guardrails(max_epochs_D=[1, 1, 1])
    controller = MixingController(SOURCES, THIRDS_D, ByLoss(), guardrails=guardrails, shadows={"s": ByLoss()})
    sizes = {"size_D": np.full(3, 100), "interval_rows": 60}
    good = Signal(loss_D=np.array([1.0, 2.0, 5.0]), drawn_D=np.zeros(3, int), **sizes)
    controller.update(good)
    before = controller.state.to_json()
    if failure == "strategy":
        controller.strategy = Broken()
        with pytest.raises(KeyError):
            controller.update(good)
    else:
        with pytest.raises(ValueError, match="leaves 30 rows"):
            controller.update(replace(good, drawn_D=np.full(3, 90)))
    assert controller.state.to_json() == before
