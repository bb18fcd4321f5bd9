"""`verify` asks every strategy again, with its guardrails, overrides and shadows."""

from dataclasses import replace

import numpy as np
import pytest
from run_fixtures import INTERVAL, fake_run

from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.config.strategies import RESOLVED, resolved_options
from megatron_dynmix.mixing.guardrails import Override
from megatron_dynmix.mixing.strategies import STRATEGIES
from megatron_dynmix.mixing.strategies.uniqueness import Uniqueness
from megatron_dynmix.verify.verify import verify_records

FROM_FILES = {
    "reference_D": [1.2, 1.1, 1.0],
    "target_D": [0.9, 0.8, 0.7],
    "weights_D": [0.5, 0.3, 0.2],
    "embeddings_DV": [[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]],
    "sizes_D": [7.0, 2.0, 1.0],
    "prior_D": [0.5, 0.3, 0.2],
    "target_source": 1,
    "points": [[0, [0.2, 0.3, 0.5]], [9, [0.4, 0.4, 0.2]]],
}


def settings(**given):
    return MixingConfig(**{"strategy": "gate-load", "interval": INTERVAL, **given})


def resolved_for(strategy):
    return {RESOLVED[setting]: FROM_FILES[RESOLVED[setting]] for setting in resolved_options(strategy)}


def proof(run):
    verdict = verify_records(run.records(state=run.state()))
    assert verdict.failure is None, verdict.failure
    return verdict


def failure(records):
    return verify_records(records).failure


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_is_replayed_from_its_records(strategy):
    options = {"epoch_cap": 20.0} if strategy == "unimax" else {}
    run = fake_run(13, settings=settings(strategy=strategy, options=options), resolved=resolved_for(strategy))
    verdict = proof(run)
    assert verdict.updates == 4 and not verdict.notes
    records = run.records()
    records.mixing[12]["new_weights"] = records.ledger[-2]["weights"] = [0.25, 0.25, 0.5]
    assert failure(records)


@pytest.mark.parametrize("strategy", ["uniform", "gate-load", "data-size"])
def test_a_corrected_strategy_is_replayed_from_its_records(strategy, monkeypatch):
    monkeypatch.setattr(Uniqueness, "alike_from", 0.0)  # no two of these sources are near copies
    plain = fake_run(13, settings=settings(strategy=strategy))
    run = fake_run(13, settings=settings(strategy=strategy, similarity_correction=True))
    assert proof(run).updates == 4
    assert run.mixing[12]["new_weights"] != plain.mixing[12]["new_weights"]


def test_the_first_weights_of_a_strategy_are_replayed():
    run = fake_run(4, settings=settings(strategy="data-size"))
    assert run.blend.stages[0].weights == pytest.approx(np.array(run.sizes) / sum(run.sizes))
    records = run.records()
    records.ledger[0]["sizes"][0] += 4
    assert "ledger.jsonl:1: the first weights are" in failure(records)


def test_guardrails_shadows_and_overrides_are_replayed():
    run = fake_run(
        settings=settings(
            options={"eta": 40.0},
            weight_floor=0.05,
            max_kl_step=0.05,
            min_entropy=0.7,
            prior="size",
            prior_pull=0.1,
            shadow=("loss-softmax", {"strategy": "gate-load", "layers": "all"}, "ado"),
        ),
        resolved={"max_epochs": [None, 5, None]},
    )
    run.train(4)
    run.override = Override(pause=("chat",))
    run.train(3)
    run.override = Override(weights={"chat": 0.2, "math": 0.3, "code": 0.5})
    run.train(3)
    run.override = None
    run.train(40)
    verdict = proof(run)
    assert verdict.updates == 16
    assert run.mixing[6]["new_weights"][0] == 0
    assert run.mixing[9]["new_weights"] == [0.2, 0.3, 0.5]
    assert any("max_epochs: math" in event["text"] for event in run.mixing[48]["events"])
    assert verdict.tallies[1].drawn <= 5 * 11
    assert list(run.mixing[6]["shadow"]) == ["loss-softmax", "gate-load:layers=all", "ado"]


def guarded():
    run = fake_run(settings=settings(max_kl_step=1e-4, shadow=("odm",)))
    run.override = Override(pause=("chat",))
    run.train(3)
    run.override = None
    return run.train(7).records()


def forget_override(records):
    records.mixing[3]["override"] = None


def change_shadow(records):
    records.mixing[6]["shadow"]["odm"][0] += 1e-6


def forget_event(records):
    records.mixing[6]["events"] = []


def change_limit(records):
    for line in records.ledger:
        if line["kind"] == "stage":
            line["mixing"]["max_kl_step"] = 0.02


def change_loss(records):
    records.mixing[6]["loss"][0] += 1


@pytest.mark.parametrize(
    "change, where",
    [
        (forget_override, "iteration 3: new_weights does not follow"),
        (change_shadow, "iteration 6: shadow odm does not follow"),
        (forget_event, "iteration 6: events are []"),
        (change_limit, "iteration 3: new_weights does not follow"),
        (change_loss, "iteration 6: shadow odm does not follow"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_was_changed_is_named(change, where):
    records = guarded()
    change(records)
    assert where in failure(records)


def test_other_settings_from_a_resumption_on_are_replayed():
    run = fake_run(8, settings=settings(strategy="odm"))
    run.change_settings(settings(strategy="ado", shadow=("odm",))).train(8)
    run.change_settings(settings(strategy="gate-load", options={"eta": 3.0})).train(7)
    run.change_settings(settings(strategy="fixed", weight_floor=0.1)).train(7)
    assert proof(run).updates == 10


def test_memory_of_strategies_and_shadows_ends_where_the_sources_change():
    run = fake_run(10, settings=settings(strategy="odm", shadow=("ado",)))
    prints = {
        "math": ["sha of math", "tokenizer", "template"],
        "law": ["sha of law", "tokenizer", "template"],
        "chat": ["another sha", "tokenizer", "template"],
    }
    run.change_sources(prints, (11, 9, 55))
    assert proof(run.train(10)).updates == 6


def own_rule(weights_D, signal):
    """A user's rule."""
    return weights_D[::-1].copy()


def test_a_users_own_strategy_is_not_replayed_and_that_is_said():
    run = fake_run(7, settings=settings(strategy=f"{__name__}:own_rule"))
    verdict = proof(run)
    assert verdict.updates == 0
    assert "own_rule is the user's own: it was not replayed" in verdict.notes[0]


def test_own_rules_that_a_resumed_run_brings_are_named_too():
    own = f"{__name__}:own_rule"
    run = fake_run(4).change_settings(settings(shadow=(own,))).train(3)
    verdict = proof(run.change_settings(settings(strategy=own)).train(6))
    assert verdict.updates == 2
    assert [note.split(" is the user's own")[0] for note in verdict.notes] == [
        f"shadow {own}",
        f"strategy {own}",
    ]


def test_a_users_own_shadow_is_left_out_and_that_is_said():
    verdict = proof(fake_run(7, settings=settings(shadow=(f"{__name__}:own_rule", "odm"))))
    assert verdict.updates == 2
    assert "own_rule is the user's own: it was not replayed" in verdict.notes[0]


def test_weights_kept_for_a_broken_override_are_proven():
    run = fake_run(3)
    records = run.records()
    note = {"kind": "override_unusable", "text": "weights kept: override.json cannot be used"}
    kept = {**records.mixing[3], "signal": None, "block": None, "notes": [note]}
    kept["new_weights"] = kept["old_weights"]
    records.mixing[3] = kept
    records.ledger[-1]["weights"] = kept["old_weights"]
    assert verify_records(replace(records, state=None)).failure is None
