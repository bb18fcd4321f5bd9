"""Strategies, shadows and guardrails as settings: flat, completed, refused by name."""

import dataclasses
import json
import typing

import numpy as np
import pytest
from config_fixtures import good_settings, load

from megatron_dynmix.cli import main
from megatron_dynmix.config.check import check_run
from megatron_dynmix.config.leaves import all_leaves, mixing_leaves
from megatron_dynmix.config.load import to_yaml
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.config.strategies import RESOLVED, option_hints
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.strategies import STRATEGIES
from megatron_dynmix.training.mix import Mix, check_mix

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
ROWS = [range(20)] * 3
"""Of which only the number is asked."""


def test_every_option_of_every_strategy_is_a_setting_of_the_mixing_section():
    fields = {field.name: field for kind in STRATEGIES.values() for field in dataclasses.fields(kind)}
    assert option_hints().keys() | set(RESOLVED.values()) == fields.keys()
    hints = [typing.get_type_hints(kind) for kind in STRATEGIES.values()]
    for name, hint in option_hints().items():
        assert {str(found[name]) for found in hints if name in found} == {str(hint)}, "one name, one type"
    assert all(all_leaves()[name].section == "mixing" for name in option_hints())
    own = {name for name, leaf in all_leaves().items() if leaf.section == "mixing"}
    assert own == mixing_leaves().keys()


def test_options_are_flat_flags_and_completed(tmp_path):
    flags = ["--strategy", "ref-loss", "--eta", "2", "--clip", "--shadow", "[odm, {strategy: ado}]"]
    config = load(tmp_path, good_settings(tmp_path), flags).mixing
    assert config.options == {"eta": 2.0, "smoothing": 1e-4, "clip": True, "max_gap": 10.0}
    assert [shadow.label for shadow in config.shadows] == ["odm", "ado"]
    assert MixingConfig.from_flat(json.loads(json.dumps(config.flat()))).options == config.options


def test_the_resolved_settings_read_back(tmp_path):
    flags = ["--schedule", "[[0, {chat: 1, math: 1, code: 1}]]", "--strategy", "schedule"]
    flags += ["--prior", "{chat: 1, math: 2, code: 1}", "--shadow", "[{strategy: gate-load, eta: 1e1}]"]
    config = load(tmp_path, good_settings(tmp_path), flags)
    (tmp_path / "again").mkdir()
    assert load(tmp_path / "again", to_yaml(config)) == config


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"strategy": "gate-lod"}, "mixing.strategy is 'gate-lod'; it must be one of gate-load"),
        ({"strategy": "uniform", "eta": 1.0}, "mixing.eta is no option of strategy uniform, which has none"),
        ({"strategy": "m:f", "eta": 1.0}, "put its options under mixing.strategy_options"),
        ({"strategy_options": {"x": 1}}, "strategy_options are for a strategy of your own"),
        ({"shadow": ["uniform"]}, "uniform never changes weights"),
        ({"shadow": [{"eta": 1}]}, "give the name of a strategy"),
        ({"shadow": ["odm", "odm"]}, "odm twice"),
        ({"shadow": [{"strategy": "odm", "eta": 1.0}]}, "mixing.shadow odm.eta is no option"),
        (
            {"shadow": [{"strategy": "ref-loss", "reference": "r.json"}]},
            "reference is shared: give it as mixing.",
        ),
        ({"min_tokens": -1}, "mixing.min_tokens"),
        ({"begin_with": "odm"}, "odm, which has no weights before anything is measured; give one of "),
        ({"begin_with": "match-load"}, "has no weights before anything is measured"),
        ({"begin_with": "sent-em"}, "mixing.begin_with sent-em.strategy is 'sent-em'; it must be one of"),
        ({"begin_with": {"eta": 1.0}}, "mixing.begin_with holds {'eta': 1.0}; give the name of a strategy"),
        ({"begin_with": "sent-emb", "strategy": "sequential"}, "sequential has first weights of its own"),
        ({"begin_with": "sent-emb", "strategy": "fixed"}, "strategy fixed has first weights of its own"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(settings, part):
    with pytest.raises(InputError) as caught:
        MixingConfig.from_flat(settings)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "mixing, part",
    [
        ({"strategy": "ref-loss"}, "needs mixing.reference"),
        ({"reference": "chat.jsonl"}, "strategy gate-load does not read it"),
        ({"strategy": "fixed", "shadow": ["sheared"]}, "strategy sheared needs mixing.target"),
        ({"begin_with": "sent-emb"}, "strategy sent-emb needs mixing.embeddings"),
    ],
)
def test_files_that_are_missing_or_not_read_are_refused(tmp_path, mixing, part):
    content = good_settings(tmp_path)
    content["mixing"] |= mixing
    with pytest.raises(InputError, match=part):
        check_run(load(tmp_path, content), 2)


@pytest.mark.parametrize("unit", ["tokens", "examples"])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_run_begins_with_the_weights_of_another_strategy(tmp_path, unit, corrected):
    embeddings = {"chat": [0.0, 0.0], "math": [0.03, 0.0], "code": [0.0, 0.04]}
    (tmp_path / "embeddings.json").write_text(json.dumps(embeddings))
    content = good_settings(tmp_path)
    content["mixing"] |= {"unit": unit, "embeddings": "embeddings.json"}
    rows = [type("Rows", (list,), {"mean_examples_per_row": number})(range(20)) for number in (1.0, 2.0, 4.0)]
    first = []
    for mixing in (
        {"begin_with": {"strategy": "sent-emb", "eta": 2.0}},
        {"strategy": "sent-emb", "eta": 2.0},
    ):
        settings = {**content["mixing"], **mixing, "similarity_correction": corrected}
        config = load(tmp_path, {**content, "mixing": settings})
        check_run(config, 2)
        first.append(Mix.of(config, check_mix(config, 2), rows).first_D.tolist())
    assert first[0] == first[1] and len(set(first[0])) == 3
    assert config.mixing.asked == [config.mixing.chosen]


@pytest.mark.parametrize("mixing", [{"strategy": "odm"}, {"strategy": "fixed", "shadow": ["odm"]}])
def test_losses_are_probed_where_there_are_held_out_rows_only(tmp_path, mixing):
    content = good_settings(tmp_path)
    content["mixing"] |= mixing
    del content["data"]["sources"]["math"]["probe"]
    with pytest.raises(InputError, match=r"odm and mixing\.signal probe, but source math has no probe"):
        check_run(load(tmp_path, content), 2)
    content["mixing"]["signal"] = "train"
    check_run(load(tmp_path, content), 2)


def test_a_shadow_on_gates_needs_gates(tmp_path):
    content = good_settings(tmp_path)
    content["model"]["num_moe_experts"] = None
    content["parallel"] = {}
    content["mixing"] |= {"strategy": "odm", "shadow": ["gate-load"]}
    with pytest.raises(InputError, match=r"mixing\.shadow has gate-load, but the model is dense"):
        check_run(load(tmp_path, content), 2)


@pytest.mark.parametrize(
    "mixing, part",
    [
        ({"weight_floor": 0.5}, "floor 0.5 for 3 sources adds up to 1.5"),
        ({"prior_pull": 0.5}, "needs a prior"),
        ({"prior": "even", "prior_pull": 0.5}, "prior is 'even'"),
        ({"prior": {"chat": 1.0}, "prior_pull": 0.5}, "missing"),
        ({"max_kl_step": 0.0}, "max_kl_step"),
        ({"strategy": "no_such_module:rule"}, "cannot be imported"),
        ({"shadow": [{"strategy": "gate-load", "layers": [7]}]}, "layer 7 was chosen"),
    ],
)
def test_guardrails_and_shadows_that_cannot_be_made_are_refused(tmp_path, mixing, part):
    content = good_settings(tmp_path)
    content["mixing"] |= mixing
    with pytest.raises(InputError) as caught:
        check_mix(load(tmp_path, content), 2)
    assert str(caught.value).startswith("mixing: ") and part in str(caught.value)


def test_caps_that_cannot_feed_the_run_say_how_many_rows_are_missing(tmp_path):
    content = good_settings(tmp_path)
    for source in content["data"]["sources"].values():
        source["max_epochs"] = 2
    config = load(tmp_path, content)
    with pytest.raises(InputError, match=r"allows 120 rows, but the run takes 160: 40 rows are missing"):
        Mix.of(config, {"max_epochs": [2] * 3}, ROWS)
    del content["data"]["sources"]["math"]["max_epochs"]
    mix = Mix.of(load(tmp_path, content), {"max_epochs": [2, None, 2]}, ROWS)
    assert mix.first_D.sum() == pytest.approx(1)


def answer(capsys, *argv):
    assert main(["update", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_update_with_losses_guardrails_and_shadows(capsys, tmp_path):
    paths = {}
    for name, content in {
        "loss": {"chat": 2.0, "math": 1.0, "code": 1.0},
        "reference": {"chat": 1.0, "math": 1.0, "code": 1.0},
    }.items():
        paths[name] = str(tmp_path / f"{name}.json")
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    flags = ["--loss", paths["loss"], "--strategy", "ref-loss", "--reference", paths["reference"]]
    plain = answer(capsys, *flags, "--smoothing", "0")
    total = np.e + 2
    assert plain["weights"] == pytest.approx({"chat": np.e / total, "math": 1 / total, "code": 1 / total})
    limited = answer(capsys, *flags, "--max-kl-step", "0.01", "--shadow", "[loss-softmax]")
    assert limited["weights"]["chat"] < plain["weights"]["chat"]
    assert limited["events"][0].startswith("kl-step") and list(limited["shadow"]) == ["loss-softmax"]


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--strategy", "uniform"], "nothing to update from"),
        (["--interval", "3"], "--interval is an unknown flag"),
        (["--strategy", "doremi"], "mixing.strategy is 'doremi'"),
        (["--etta", "1"], "--etta is an unknown flag; did you mean --eta?"),
    ],
)
def test_update_refuses_flags_that_mean_nothing(capsys, flags, part):
    assert main(["update", *flags]) == 2
    assert part in capsys.readouterr().err
