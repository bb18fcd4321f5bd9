"""The definition of a run's records: what is written comes back, and what is no record is named."""

import json
import math
from dataclasses import make_dataclass, replace
from typing import Any, TypeVar, get_args

import numpy as np
import pytest
from run_fixtures import fake_run, training_record
from typing_extensions import TypeAliasType

from megatron_dynmix.mixing.strategy import Remark, RemarkKind
from megatron_dynmix.records import schema
from megatron_dynmix.records.schema import Event, MixingUpdate, SamplesLine, StageLine, TrainingRecord


@pytest.fixture(scope="module")
def run():
    return fake_run(7)


def update_of(run, **changes):
    return replace(run.with_arrays(MixingUpdate.from_json(run.mixing[6])), **changes)


def lines(run):
    event = Event(iteration=3, event="failed", time="now", version="1", ranks=2, notes=["a", "b"])
    ledger = [(StageLine if line["kind"] == "stage" else SamplesLine).from_json(line) for line in run.ledger]
    return [training_record(5, 160), event, *ledger, MixingUpdate.from_json(run.mixing[3])]


def test_every_line_comes_back_as_it_was_written(run):
    for line in lines(run):
        text = json.dumps(line.to_json(), allow_nan=False)
        assert type(line).from_json(json.loads(text)).to_json() == json.loads(text)
        assert type(line).salvaged(json.loads(text)).to_json() == json.loads(text)


def test_an_update_of_before_its_stale_sources_were_told_is_read(run):
    line = json.loads(json.dumps(MixingUpdate.from_json(run.mixing[3]).to_json()))
    del line["signal"]["stale"]
    assert MixingUpdate.from_json(line).signal.stale == []


def test_every_float_comes_back_to_the_bit():
    values = [*np.random.default_rng(0).random(50).tolist(), math.nan, math.inf, -0.0, 5e-324]
    record = training_record(1, source_loss={str(place): value for place, value in enumerate(values)})
    back = TrainingRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    assert np.array_equal(
        np.array(list(back.source_loss.values())).view(np.int64), np.array(values).view(np.int64)
    )


@pytest.mark.parametrize("damage", ["missing", {"a": 1}, [[1, 2], [3]], True, "many"])
def test_what_is_damaged_is_named_or_left_out(run, damage):
    for line in lines(run):
        record = line.to_json()
        for name in record:
            damaged = {key: value for key, value in record.items() if key != name}
            damaged |= {} if damage == "missing" else {name: damage}
            kind = type(line)
            try:
                kind.from_json(damaged)
            except ValueError as error:
                assert name in str(error)
            salvaged = kind.salvaged(damaged)
            rest = {key: value for key, value in salvaged.to_json().items() if key != name}
            assert rest == {key: value for key, value in record.items() if key != name}


def test_what_has_another_kind_is_no_record(run):
    event = lines(run)[1].to_json() | {"event": "joy"}
    with pytest.raises(ValueError, match="event: 'joy' is none of 'start', 'resume'"):
        Event.from_json(event)


@pytest.mark.parametrize("kind", get_args(RemarkKind))
def test_notes_and_events_keep_their_kind(run, kind):
    update = update_of(run, notes=[Remark(kind, "so it is")], events=[Remark(kind, "and so")])
    record = json.loads(json.dumps(update.to_json()))
    assert record["notes"] == [{"kind": kind, "text": "so it is"}]
    back = MixingUpdate.from_json(record)
    assert (back.notes, back.events) == (update.notes, update.events)


def test_loads_of_several_layers_are_not_in_the_line(run):
    update = update_of(run)
    assert update.load.ndim == 2 and "load" not in update.arrays
    several = replace(update, load=np.full((3, 2, 8), 1 / 16))
    assert several.to_json()["load"] is None and several.arrays["load"] is several.load
    back = MixingUpdate.from_json(several.to_json()).with_arrays(several.arrays)
    assert np.array_equal(back.load, several.load) and back.counts.keys() == {"half_counts"}


def test_arrays_are_read_where_numpy_has_a_type_of_its_own_for_them(monkeypatch):
    """As NumPy 2.5 does, with the alias of Python 3.12."""
    item = TypeVar("item")
    alias = TypeAliasType("NDArray", np.ndarray[Any, np.dtype[item]], type_params=(item,))
    monkeypatch.setattr(schema, "NDArray", alias)
    line = make_dataclass("Line", [("load", alias[np.float64])], bases=(schema.Line,), frozen=True)
    assert np.array_equal(line.from_json({"load": [[1, 2.5]]}).load, [[1.0, 2.5]])
