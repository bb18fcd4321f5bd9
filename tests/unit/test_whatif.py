"""Other rules over the records of a run, and the run's own over them again."""

import json
from dataclasses import replace

import pytest
from run_fixtures import MIXING, fake_run

from megatron_dynmix.cli import main
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import CommandFailed, InputError
from megatron_dynmix.mixing.guardrails import Override
from megatron_dynmix.whatif.page import remarks_lines
from megatron_dynmix.whatif.rules import Rule, replayed, run_itself

SETTINGS = {
    "gate-load": MIXING,
    "guarded": replace(MIXING, max_kl_step=0.001, weight_floor=0.1),
    "uniqueness": MixingConfig(strategy="uniqueness", interval=3),
    "ado": MixingConfig(strategy="ado", interval=3),
    "examples": MixingConfig(strategy="gate-load", interval=3, unit="examples"),
}


@pytest.fixture(scope="module", params=SETTINGS)
def run(request):
    resolved = {"examples_per_row": [1.5, 3.0, 2.0]} if request.param == "examples" else {}
    return fake_run(11, settings=SETTINGS[request.param], resolved=resolved)


def shares(tried):
    return [list(point.shares.values()) for point in tried.points]


def recorded(run):
    return [line["weights"] for line in run.ledger if line["kind"] == "stage"]


def test_the_runs_own_settings_give_its_own_weights_to_the_bit(run):
    own, said = run_itself(run.records())
    assert shares(own) == recorded(run) and said.endswith("exactly.")
    assert [point.iteration for point in own.points] == [0, 3, 6, 9]


def test_a_rule_gives_what_a_run_with_it_would_have_given(run):
    """The signals of a fake run do not depend on its weights, so its whole way can be told."""
    other = MixingConfig(
        strategy="gate-load", interval=3, options={"smoothing": 0.3, "metric": "cos"}, weight_floor=0.05
    )
    changes = {"strategy": "gate-load", "smoothing": 0.3, "metric": "cos", "weight_floor": 0.05}
    if run.settings.unit == "examples" or run.settings.max_kl_step:
        changes |= {"max_kl_step": None}
    tried = replayed(run.records(), Rule("other", changes))
    settings = replace(other, unit=run.settings.unit)
    assert shares(tried) == recorded(fake_run(11, settings=settings, resolved=run.resolved))


def test_caps_are_held_over_the_rows_that_the_rule_itself_draws():
    resolved = {"max_epochs": [None, 2.0, None]}
    run = fake_run(30, resolved=resolved)
    changes = {"strategy": "gate-load", "smoothing": 0.9}
    stronger = MixingConfig(strategy="gate-load", interval=3, options={"smoothing": 0.9})
    tried = replayed(run.records(), Rule("stronger", changes))
    assert shares(tried) == recorded(fake_run(30, settings=stronger, resolved=resolved))


def test_sources_that_change_strategies_that_change_and_an_operator():
    run = fake_run(8)
    run.override = Override(pause=("math",))
    run.train(4)
    run.override = None
    run.change_settings(replace(MIXING, options={"smoothing": 0.2}))
    run.train(4)
    run.change_sources({"chat": ["a"], "law": ["b"], "code": ["c"]}, (40, 17, 23))
    run.train(8)
    own, _ = run_itself(run.records())
    assert shares(own) == recorded(run)
    uniform = replayed(run.records(), Rule("uniform", {"strategy": "uniform"}))
    assert set(uniform.points[-1].shares) == {"chat", "law", "code"}
    paused = [point.shares["math"] for point in uniform.points if point.iteration in (9, 12)]
    assert paused == [0.0, 0.0], "the operator's word holds whatever the rule"


def test_records_that_were_changed_are_not_read_as_if_they_were_whole():
    run = fake_run(8)
    line = next(line for line in run.ledger if line.get("why") == "update")
    line["weights"] = line["weights"][::-1]
    with pytest.raises(CommandFailed, match="verify"):
        run_itself(run.records())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"interval": 50}, "interval"),
        ({"signal": "train"}, "signal"),
        ({"lr": 1e-4}, "lr"),
        ({"shadow": ["uniform"]}, "shadow"),
    ],
)
def test_what_was_measured_cannot_be_changed_afterwards(changes, why):
    with pytest.raises(InputError, match=f"mine sets {why}"):
        Rule("mine", changes)


def test_a_rule_that_needs_what_was_not_measured_is_refused_by_name():
    run = fake_run(8, settings=MixingConfig(strategy="gate-load", interval=3))
    for update in run.mixing.values():
        update["loss"] = None
    with pytest.raises(InputError, match=r"mine: .*loss"):
        replayed(run.records(), Rule("mine", {"strategy": "ado"}))


def test_what_a_rule_says_again_and_again_is_one_line():
    run = fake_run(20, settings=MixingConfig(strategy="gate-load", interval=3))
    tried = replayed(run.records(), Rule("new", {"strategy": "uniqueness", "min_gap": 1000.0}))
    said = remarks_lines([tried])
    times = sum(times for _, times in tried.remarks.values())
    assert times > len(said) > 0 and "such remarks" in " ".join(said)


def test_the_command_prints_both_tables_and_writes_the_page(tmp_path, capsys):
    folder = fake_run(20).write(tmp_path / "run")
    grid = tmp_path / "grid.yaml"
    grid.write_text(json.dumps({"calm": {"smoothing": 0.1, "max_kl_step": 0.0001}}))
    assert main(["whatif", str(folder), "--strategies", "uniform,uniqueness", "--grid", str(grid)]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert rows["as run"][-1] == "0" and rows["calm"][-1] == "6", (
        "every update of the calm rule was held back"
    )
    assert float(rows["uniform"][4]) == 0.0
    assert "give its own weights exactly" in out
    page = (folder / "whatif.html").read_text()
    assert page.count("Weights: ") >= 4 and "How far each rule is from the run" in page


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "nothing to compare"),
        (["--strategies", "gate-lode"], "gate-lode"),
        (["--strategies", "uniform:interval=5"], "interval"),
        (["--strategies", "uniform,uniform"], "given twice"),
        (["--strategies", "ref-loss"], "needs mixing.reference (--reference): a JSON file"),
        (["--strategies", "match-load"], "needs mixing.match (--match): the name of the source"),
        (["--strategies", "no_such_module:mine"], "no_such_module"),
    ],
)
def test_a_users_mistake_is_one_message(tmp_path, capsys, arguments, why):
    folder = fake_run(8).write(tmp_path / "run")
    assert main(["whatif", str(folder), *arguments]) == 2
    err = capsys.readouterr().err
    assert why in err and len(err.splitlines()) == 1
    assert not (folder / "whatif.html").exists()


def test_a_run_without_updates_says_what_would_help(tmp_path, capsys):
    folder = fake_run(2).write(tmp_path / "run")
    assert main(["whatif", str(folder), "--strategies", "uniform"]) == 2
    assert "--shadow" in capsys.readouterr().err
    assert not list(folder.glob("*.html"))
