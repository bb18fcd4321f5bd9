"""From settings to what decides the weights: a user's own rule, files that are not needed yet."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from config_fixtures import good_settings, load

from megatron_dynmix.cli import main
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.controller import MixingController
from megatron_dynmix.mixing.strategy import Proposal, Signal, SourceError, Strategy
from megatron_dynmix.records.mixing_update import update_record
from megatron_dynmix.training.mix import Mix, check_mix, initial_shares
from megatron_dynmix.training.mix_setup import reason
from megatron_dynmix.training.start_report import mix_warnings

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")


class Careless:
    """A user's own strategy that fails in its own way, where it is told to."""

    name = "careless"
    needs_gate_load = needs_loss = False
    starts = updates = True

    def __init__(self, where="propose"):
        if where == "constructor":
            raise RuntimeError("no licence")

    def propose(self, weights_D, signal, state):
        return {}["maths"]


def rows(*per_row):
    return [
        SimpleNamespace(mean_examples_per_row=number, __len__=lambda self: 20, name="x") for number in per_row
    ]


def own(tmp_path, **options):
    content = good_settings(tmp_path)
    content["mixing"] |= {"strategy": f"{__name__}:Careless", "strategy_options": options}
    return load(tmp_path, content)


def test_whatever_a_users_own_rule_does_wrong_is_one_message(tmp_path):
    with pytest.raises(InputError, match=r"^mixing: KeyError: 'maths'"):
        Mix.of(own(tmp_path), {}, [range(20)] * 3)
    with pytest.raises(InputError, match="no licence"):
        check_mix(own(tmp_path, where="constructor"), 2)


def test_update_takes_a_users_own_rule_with_its_options(capsys, tmp_path):
    loss = tmp_path / "loss.json"
    loss.write_text(json.dumps({"chat": 2.0, "math": 1.0}))
    flags = ["update", "--loss", str(loss), "--strategy", f"{__name__}:Careless"]
    assert main(flags) == 2
    assert "loss.json: KeyError: 'maths'" in capsys.readouterr().err
    assert main([*flags, "--strategy-options", "{where: constructor}"]) == 2
    assert "no licence" in capsys.readouterr().err


class Misshapen(Strategy):
    """Its numbers about the update are not what the records hold."""

    name = "misshapen"

    def __init__(self, **parts):
        self.parts = parts

    def propose(self, weights_D, signal, state):
        return Proposal(weights_D, np.zeros(3), **self.parts)


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"load_DLE": [1.0, 0.0]}, r"gave a load of shape \(2,\); need \(3, any, any\)"),
        ({"distance_DD": np.ones((2, 2))}, r"gave a distance of shape \(2, 2\); need \(3, 3\)"),
        ({"delta_error_D": [1.0]}, r"gave a delta error of shape \(1,\); need \(3\)"),
        ({"load_DLE": [[[np.nan]]] * 3}, "gave a NaN or infinite load"),
    ],
)
def test_what_no_record_could_hold_is_refused_with_the_weights(parts, message):
    """While it can be: once the other ranks know the weights, they wait for the one that writes it."""
    controller = MixingController(("a", "b", "c"), np.full(3, 1 / 3), Misshapen(**parts))
    with pytest.raises(ValueError, match=message):
        controller.update(Signal())


def test_a_users_own_loads_of_any_length_are_recorded():
    rule = Misshapen(load_DLE=[[[0.5, 0.25, 0.25]]] * 3)
    controller = MixingController(("a", "b", "c"), np.full(3, 1 / 3), rule)
    decision = controller.update(Signal(counts_DLE=np.ones((3, 2, 8))))
    three_D = np.full(3, 1 / 3)
    record = update_record(
        *(controller, decision),
        **{"iteration": 1, "consumed_samples": 1, "old_D": three_D, "new_D": three_D},
        **{"tokens_D": np.ones(3, int), "rows_D": np.ones(3, int), "size_D": np.ones(3, int), "seconds": {}},
    )
    assert record.load.tolist() == [[0.5, 0.25, 0.25]] * 3


@pytest.mark.parametrize("unit", ["tokens", "examples"])
def test_shares_are_told_before_the_files_of_a_strategy_are_there(tmp_path, unit):
    """`prepare` comes first: the reference losses may be those of a run that is still to come."""
    content = good_settings(tmp_path)
    content["mixing"] |= {"strategy": "ref-loss", "reference": "later.json", "unit": unit}
    shares_D = initial_shares(load(tmp_path, content), rows(1.0, 1.0, 2.0))
    expected = [1 / 3] * 3 if unit == "tokens" else [0.4, 0.4, 0.2]
    assert shares_D.tolist() == pytest.approx(expected)


def test_settings_with_which_no_weight_can_change_are_said(tmp_path):
    settings = good_settings(tmp_path)
    assert mix_warnings(load(tmp_path, settings)) == []
    settings["mixing"]["interval"] = 10**6
    settings["mixing"]["signal"] = "train"
    next(iter(settings["data"]["sources"].values()))["weight"] = 0
    for source in list(settings["data"]["sources"].values())[1:]:
        source["weight"] = 1
    late, idle = mix_warnings(load(tmp_path, settings))
    assert "the first weight update is due after iteration 1000000" in late
    assert "begin with weight 0" in idle
    settings["mixing"]["strategy"] = "fixed"
    assert mix_warnings(load(tmp_path, settings)) == []


@pytest.mark.parametrize(
    "mixing, late",
    [
        ({"strategy": "sequential", "every": 250}, "250"),
        ({"strategy": "schedule", "schedule": [[0, {"a": 1}], [150, {"a": 1}], [200, {"a": 1}]]}, "150"),
        ({"strategy": "sequential", "every": 300}, None),
    ],
)
def test_a_plan_that_changes_weights_between_two_updates_is_told_when_it_acts(tmp_path, mixing, late):
    settings = good_settings(tmp_path)
    settings["mixing"] = {"strategy": "gate-load", "signal": "probe", "interval": 100, **mixing}
    lines = mix_warnings(load(tmp_path, settings))
    assert [f"is to change the weights at {late}, between two updates" in line for line in lines] == (
        [True] if late else []
    )


def test_a_source_that_mixing_counts_is_named():
    names = ["chat", "math", "code"]
    error = SourceError([1], "is 3", before="the loss of ")
    assert error.dataset_ids == (1,) and str(error) == "the loss of source 1 (counted from 0) is 3"
    assert reason(error, names) == "the loss of source math is 3"
    assert reason(error) == str(error)
    assert reason(error.within("plan"), names) == "plan: the loss of source math is 3"
    error = SourceError([0, 2], "must have rows")
    assert str(error) == "sources [0, 2] (counted from 0) must have rows"
    assert reason(error, names) == "sources chat, code must have rows"
    assert reason(ValueError("source 1 (counted from 0) is a text"), names).startswith("source 1 ")


def test_update_names_the_source_whose_loss_cannot_be(tmp_path, capsys):
    (tmp_path / "loss.json").write_text('{"chat": 2.0, "math": 30.0}')
    (tmp_path / "reference.json").write_text('{"chat": 2.0, "math": 1.0}')
    flags = ["--strategy", "ref-loss", "--reference", str(tmp_path / "reference.json")]
    assert main(["update", "--loss", str(tmp_path / "loss.json"), *flags]) == 2
    assert "the reference loss of source math is 1.0" in capsys.readouterr().err
