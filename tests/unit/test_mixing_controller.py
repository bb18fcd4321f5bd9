"""The controller adopts sound proposals only, remembers counts, and resumes bit for bit."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_dynmix.mixing.controller import MixingController, MixingUpdate
from megatron_dynmix.mixing.gate_load import GateLoad
from megatron_dynmix.mixing.static import Fixed
from megatron_dynmix.mixing.strategy import Proposal, Signal

SOURCES = ("code", "math", "chat")
THIRDS_D = np.full(3, 1 / 3)
COUNTS_DLE = np.array([[[9, 1, 2]], [[3, 4, 5]], [[4, 4, 4]]])


@dataclass
class Scripted:
    """Proposes whatever the test says, from no signal."""

    proposal: Proposal
    name: str = "scripted"
    needs_gate_load: bool = False
    updates: bool = True

    def propose(self, weights_D, signal, state: object):
        return self.proposal


def without(counts_DLE, dataset_id):
    counts_DLE = counts_DLE.copy()
    counts_DLE[dataset_id] = 0
    return counts_DLE


def test_update_adopts_the_proposal():
    controller = MixingController(SOURCES, THIRDS_D, GateLoad())
    proposal, note = controller.update(Signal(counts_DLE=COUNTS_DLE))
    assert note is None
    assert controller.weights_D.tolist() == proposal.weights_D.tolist() != THIRDS_D.tolist()
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
        Proposal(np.array([0.5, 0.25, 0.25]), np.zeros(3), load_DE=np.full((3, 2), np.nan)),
        Proposal(np.array([0.5, 0.25, 0.25]), np.zeros(3), distance_DD=np.full((3, 3), np.inf)),
    ],
)
def test_a_broken_proposal_is_refused_and_the_weights_stay(proposal):
    controller = MixingController(SOURCES, THIRDS_D, Scripted(proposal))
    with pytest.raises(ValueError):
        controller.update(Signal())
    assert controller.weights_D.tolist() == THIRDS_D.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_broken_counts_are_refused_by_name_and_not_remembered(value):
    controller = MixingController(SOURCES, THIRDS_D, GateLoad())
    broken_DLE = without(COUNTS_DLE.astype(float), 0)
    broken_DLE[1, 0, 0] = value
    before = controller.state_dict()
    with pytest.raises(ValueError, match="'math'"):
        controller.update(Signal(counts_DLE=broken_DLE))
    assert controller.state_dict() == before


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
    _, note_seen = seen.update(Signal(counts_DLE=COUNTS_DLE))
    _, note_unseen = unseen.update(Signal(counts_DLE=without(COUNTS_DLE, 1)))
    assert note_seen is None
    assert "last known counts used: math" in note_unseen
    assert unseen.state_dict() == seen.state_dict()


def test_weights_are_kept_until_every_source_was_measured():
    controller = MixingController(SOURCES, THIRDS_D, GateLoad())
    proposal, note = controller.update(Signal(counts_DLE=without(COUNTS_DLE, 2)))
    assert "weights kept" in note and "chat" in note and "code" not in note
    assert controller.weights_D.tolist() == proposal.weights_D.tolist() == THIRDS_D.tolist()
    assert proposal.delta_D.tolist() == [0, 0, 0] and proposal.load_DE is None

    # The rows of that first interval were remembered: chat alone completes the picture.
    only_chat_DLE = without(without(COUNTS_DLE, 0), 1)
    _, note = controller.update(Signal(counts_DLE=only_chat_DLE))
    assert "code, math" in note
    assert controller.weights_D.tolist() != THIRDS_D.tolist()


def test_state_survives_json_bit_for_bit():
    first = MixingController(SOURCES, THIRDS_D, GateLoad())
    first.update(Signal(counts_DLE=COUNTS_DLE))
    second = MixingController(SOURCES, THIRDS_D, GateLoad())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
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
    state = MixingController(SOURCES, THIRDS_D, Fixed()).state_dict()
    with pytest.raises(ValueError, match=difference):
        MixingController(sources, THIRDS_D, Fixed()).load_state_dict(state)


@pytest.mark.parametrize(
    "damage", [{"weights": [0.5, 0.5]}, {"weights": [0.5, 0.5, 0.5]}, {"last_counts": [None]}]
)
def test_damaged_state_is_refused(damage):
    controller = MixingController(SOURCES, THIRDS_D, Fixed())
    before = controller.state_dict()
    with pytest.raises(ValueError):
        controller.load_state_dict(before | damage)
    assert controller.state_dict() == before


@pytest.mark.parametrize(
    ("sources", "weights"),
    [((), []), (("a", "a"), [0.5, 0.5]), (("a", "b"), [1.0]), (("a", "b"), [1.0, 1.0])],
)
def test_controller_refusals(sources, weights):
    with pytest.raises(ValueError):
        MixingController(sources, np.array(weights), Fixed())


def test_update_record_is_plain_json():
    update = MixingUpdate(
        iteration=100,
        consumed_samples=800,
        sources=SOURCES,
        old_weights=THIRDS_D,
        new_weights=np.array([0.5, 0.25, 0.25]),
        delta=None,
        load=None,
        distance=np.zeros((3, 3)),
        tokens=np.array([10, 20, 30]),
        rows=[1, 2, 3],
        epochs=(0.5, 1.0, 1.5),
        seconds={"signal": np.float64(0.5)},
    )
    record = update.to_json()
    assert json.loads(json.dumps(record)) == record
    assert list(record) == [
        *("iteration", "consumed_samples", "sources", "old_weights", "new_weights", "delta", "load"),
        *("distance", "tokens", "rows", "epochs", "seconds", "note"),
    ]
    assert record["sources"] == ["code", "math", "chat"]
    assert record["old_weights"] == [1 / 3] * 3
    assert record["tokens"] == [10, 20, 30]
    assert record["delta"] is None and record["note"] is None
