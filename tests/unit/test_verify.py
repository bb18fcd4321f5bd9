"""`verify` proves what a run wrote, and names the first thing that does not agree."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from run_fixtures import BATCH, fake_run

from megatron_dynmix.cli import main
from megatron_dynmix.errors import InputError
from megatron_dynmix.records.schema import MixingUpdate
from megatron_dynmix.verify.replay import Replay, SourceTally
from megatron_dynmix.verify.run_records import read_run, stage_line
from megatron_dynmix.verify.verdict import verdict_text
from megatron_dynmix.verify.verify import verify, verify_records


@pytest.fixture(scope="module")
def good():
    run = fake_run(20)
    return run.records(state=run.state())


def changed(records, change):
    """The records after `change(records)`, the good ones left as they are."""
    records = copy.deepcopy(records)
    change(records)
    return records


def failure(records):
    verdict = verify_records(records)
    assert not verdict.proven and verdict_text(verdict).splitlines()[-1].startswith("NOT PROVEN: ")
    return verdict.failure


def test_I4_a_whole_run_is_proven(good):
    verdict = verify_records(good)
    assert verdict.failure is None
    assert (verdict.samples, verdict.iteration, verdict.updates) == (160, 20, 6)
    assert verdict.worst_stray < 2 and verdict.worst_owed < 1
    assert [(tally.name, tally.size) for tally in verdict.tallies] == [
        ("chat", 40),
        ("math", 11),
        ("code", 23),
    ]
    for tally in verdict.tallies:
        assert tally.times_R.sum() == tally.drawn and not tally.lost and not tally.repeated
        assert tally.times_R.max() - tally.times_R.min() <= 1
    assert sum(tally.drawn for tally in verdict.tallies) == 160
    assert verdict_text(verdict).splitlines()[-1].startswith("PROVEN: samples 0 to 159 (iteration 20)")


def stages(records):
    return [index for index, line in enumerate(records.ledger) if line["kind"] == "stage"]


def samples(records):
    return [index for index, line in enumerate(records.ledger) if line["kind"] == "samples"]


def flip_weight(records):
    weights = records.ledger[stages(records)[2]]["weights"]
    weights[0], weights[1] = weights[1], weights[0]


def flip_weight_everywhere(records):
    line = records.ledger[stages(records)[-1]]
    for weights in (line["weights"], records.mixing[line["iteration"]]["new_weights"]):
        weights[0], weights[1] = weights[1], weights[0]


def weights_of_another_sum(records):
    records.ledger[stages(records)[2]]["weights"][0] += 0.1


def change_digest(records):
    records.ledger[samples(records)[3]]["digest"] = "00000000000000ff"


def drop_samples(records):
    del records.ledger[samples(records)[2]]


def drop_last_samples(records):
    del records.ledger[samples(records)[-1]]


def drop_stage(records):
    del records.ledger[stages(records)[2]]


def drop_start(records):
    del records.ledger[0]


def drop_update(records):
    del records.mixing[9]


def exchange_stages(records):
    first, second = stages(records)[2:4]
    records.ledger[first], records.ledger[second] = records.ledger[second], records.ledger[first]


def exchange_weights_of_stages(records):
    one, other = (records.ledger[index] for index in stages(records)[2:4])
    one["weights"], other["weights"] = other["weights"], one["weights"]


def change_load(records):
    load = records.mixing[9]["load"]
    load[1][0], load[1][1] = load[1][1], load[1][0]


def change_counts(records):
    """In the layer that the strategy reads, with a digest that is right."""
    update = records.with_arrays(MixingUpdate.from_json(records.mixing[9]))
    update.counts["half_counts"][0, 1, -1, 0] += 1
    records.mixing[9] = records.with_arrays.__self__.line_of(update)


def spoil_signal(records):
    """One bit of the block of an update."""
    run, offset = records.with_arrays.__self__, records.mixing[9]["block"]["offset"] + 200
    run.signals = bytes([*run.signals[:offset], run.signals[offset] ^ 1, *run.signals[offset + 1 :]])


def cut_signals(records):
    run = records.with_arrays.__self__
    run.signals = run.signals[: records.mixing[9]["block"]["offset"] + 50]


def write_another_kind(records):
    records.mixing[9]["notes"] = [{"kind": "joy", "text": "all is well"}]


def forget_signal(records):
    records.mixing[9]["signal"] = None


def change_begin(records):
    records.ledger[0]["begin"]["weights"] = [0.5, 0.25, 0.25]


def change_rows(records):
    records.mixing[9]["rows"][0] += 1


def change_epochs(records):
    records.mixing[9]["epochs"][0] += 1e-9


def change_sizes(records):
    for index in stages(records):
        records.ledger[index]["sizes"][1] += 1


def change_owed(records):
    records.ledger[stages(records)[3]]["owed"][0] += 0.25


def change_seed(records):
    for index in stages(records):
        records.ledger[index]["seed"] += 1


def change_eta(records):
    records.ledger[stages(records)[3]]["mixing"]["eta"] = 9.0


def change_reach(records):
    records.ledger[samples(records)[2]]["consumed_samples"] += 8


def change_state(records, **changes):
    object.__setattr__(records, "state", replace(records.state, **changes))


def change_saved_cursor(records):
    records.state.mix.blend.cursor.drawn_D[0] += 1


def change_saved_stages(records):
    blend = records.state.mix.blend
    change_state(records, mix=replace(records.state.mix, blend=replace(blend, stages=blend.stages[:-1])))


def change_saved_digest(records):
    change_state(records, drawn=replace(records.state.drawn, digest=1))


@pytest.mark.parametrize(
    "change, where",
    [
        (flip_weight, "mixing.jsonl, iteration 6: new_weights"),
        (flip_weight_everywhere, "mixing.jsonl, iteration 18: new_weights does not follow"),
        (weights_of_another_sum, "sum to 1.1"),
        (change_digest, "ledger.jsonl:7: the samples 48 to 63 that were trained on"),
        (drop_samples, "goes on from sample 48, but the lines before end at 32"),
        (drop_last_samples, "lines are missing"),
        (drop_stage, "update after iteration 6, the ledger has no stage"),
        (drop_start, "ledger.jsonl:1 is not the start of a run"),
        (drop_update, "mixing.jsonl has no update after iteration 9"),
        (exchange_stages, "iteration 8 comes after 9"),
        (exchange_weights_of_stages, "mixing.jsonl, iteration 6: new_weights"),
        (change_load, "mixing.jsonl, iteration 9: load does not follow"),
        (change_counts, "mixing.jsonl, iteration 9: distance does not follow"),
        (spoil_signal, "signals.bin: the signal of iteration 9 is lost"),
        (cut_signals, "signals.bin: the signal of iteration 9 is lost"),
        (write_another_kind, "iteration 9 is no record of an update: notes: kind: 'joy' is none of"),
        (forget_signal, "mixing.jsonl, iteration 9: the weights changed, but nothing is recorded"),
        (change_begin, "ledger.jsonl:1: the first weights are"),
        (change_rows, "mixing.jsonl, iteration 9: rows is"),
        (change_epochs, "mixing.jsonl, iteration 9: epochs is"),
        (change_sizes, "mixing.jsonl, iteration 3: epochs is"),
        (change_owed, "rows owed of the sources at sample 72"),
        (change_seed, "were trained on are not those that the stages call for"),
        (change_eta, "mixing.jsonl, iteration 9: new_weights does not follow"),
        (change_reach, "says 56 samples were consumed after iteration 6"),
        (change_saved_cursor, "iter_0000000: rows drawn of the sources"),
        (change_saved_stages, "its stages are not those of the ledger: it has 6, the ledger 7"),
        (change_saved_digest, "iter_0000000: the samples 160 to 159"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_was_changed_is_named(good, change, where):
    assert where in failure(changed(good, change))


def test_a_row_drawn_twice_is_not_what_the_stages_call_for(good):
    """A digest over other samples, as a loader that skips a micro-batch would leave."""
    run = fake_run(6)
    run.consumed += BATCH
    run.train(2)
    run.metrics.clear()
    assert "samples" in failure(run.records())


def test_a_run_killed_between_two_lines_is_proven_up_to_there(good):
    cut = replace(good, ledger=good.ledger[:9], state=None)
    verdict = verify_records(cut)
    assert verdict.proven and verdict.samples < 160
    assert any("the ledger does not" in note for note in verdict.notes)
    for length in range(1, len(good.ledger)):
        last = good.ledger[length - 1]["iteration"]
        mixing = {iteration: record for iteration, record in good.mixing.items() if iteration <= last}
        if good.ledger[length - 1]["kind"] == "samples":
            mixing.pop(last, None)
        verdict = verify_records(replace(good, ledger=good.ledger[:length], mixing=mixing, state=None))
        assert verdict.proven, (length, verdict.failure)


def test_skipped_iterations_are_told(good):
    verdict = verify_records(replace(good, skipped_iterations=2))
    assert verdict.proven and "2 iterations changed no parameter" in verdict.notes[0]


def test_the_update_in_hand_at_a_kill_may_be_missing(good):
    last = stages(good)[-1]
    mixing = {iteration: record for iteration, record in good.mixing.items() if iteration < 18}
    verdict = verify_records(replace(good, ledger=good.ledger[: last + 1], mixing=mixing, state=None))
    assert verdict.proven and "not in mixing.jsonl: not proven" in " ".join(verdict.notes)


def test_a_checkpoint_behind_the_ledger_agrees():
    run = fake_run(7)
    state = copy.deepcopy(run.state())
    assert verify_records(run.train(9).records(state=state)).proven
    state.mix.blend.cursor.owed_D[0] += 0.5
    assert "iter_0000000: rows owed" in failure(run.records(state=state))


@pytest.mark.parametrize("iterations", [1, 7])
def test_a_checkpoint_beyond_the_ledger_proves_the_rest_by_its_digest(iterations):
    run = fake_run(iterations)
    state = run.state()
    without, verdict = verify_records(run.records()), verify_records(run.records(state=state))
    assert without.samples < run.consumed
    assert verdict.failure is None and verdict.samples == run.consumed
    state = replace(state, drawn=replace(state.drawn, digest=state.drawn.digest ^ 1))
    assert "are not those that the stages call for" in failure(run.records(state=state))


def test_nothing_on_record_is_not_called_proven():
    assert "NOTHING TO PROVE" in verdict_text(verify_records(fake_run(1).records()))


PRINTS = {
    "math": ["sha of math", "tokenizer", "template"],
    "law": ["sha of law", "tokenizer", "template"],
    "chat": ["another sha", "tokenizer", "template"],
}


def test_a_run_whose_sources_changed_is_proven_over_all_its_eras():
    run = fake_run(10)
    run.change_sources(PRINTS, (11, 9, 55))
    run.train(10)
    run.change_sources({**PRINTS, "code": ["sha of code", "tokenizer", "template"]}, (11, 9, 55, 23))
    verdict = verify_records(run.train(8).records(state=run.state()))
    assert verdict.failure is None and verdict.samples == 28 * BATCH
    names = [tally.name for tally in verdict.tallies]
    assert names == ["chat", "code", "math", "law", "chat", "code"]
    assert not any(tally.lost or tally.repeated for tally in verdict.tallies)
    assert sum(tally.drawn for tally in verdict.tallies) == 28 * BATCH
    math = verdict.tallies[2]
    assert math.drawn > 2 * math.size  # over the changes, in whole epochs


@pytest.mark.parametrize(
    "key, value, where",
    [
        ("drawn", [0, 0, 0], "rows drawn of the sources"),
        ("weights", [0.5, 1 / 3, 1 / 6], "did not keep the proportion"),
    ],
)
def test_a_change_of_sources_that_was_done_otherwise_is_named(key, value, where):
    run = fake_run(10)
    run.change_sources(PRINTS, (11, 9, 55))
    records = run.train(4).records()
    line = next(line for line in records.ledger if line.get("why") == "sources changed")
    line[key] = value
    assert where in failure(records)


def test_I4_lost_and_repeated_rows_would_be_seen():
    tally = SourceTally("chat", 4)
    tally.add(np.array([0, 1]))
    tally.add(np.array([2, 2, 3, 3, 0, 1]))
    assert (tally.lost, tally.repeated, tally.times_R.tolist()) == (2, 2, [2, 2, 2, 2])


def test_a_run_directory_is_read(tmp_path, capsys):
    folder = fake_run(20).write(tmp_path / "run")
    assert verify(folder).proven
    assert main(["verify", str(folder)]) == 0
    assert "PROVEN: samples 0 to 159" in capsys.readouterr().out
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('{"kind": "samp')  # as a kill leaves it
    assert verify(folder).proven
    text = (folder / "mixing.jsonl").read_text().splitlines()
    (folder / "mixing.jsonl").write_text("\n".join(text[:2] + text[3:]) + "\n")
    assert main(["verify", str(folder)]) == 1
    assert "NOT PROVEN: ledger.jsonl:8: mixing.jsonl has no update" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "ledger.jsonl").unlink(), "ledger.jsonl is not in it"),
        (lambda folder: (folder / "signals.bin").unlink(), "signals.bin is not in it"),
        (lambda folder: (folder / "ledger.jsonl").write_text(""), "is empty"),
        (
            lambda folder: (folder / "ledger.jsonl").write_text('{"iteration": 0, "why": "start"}\n'),
            "no line of",
        ),
        (lambda folder: (folder / "mixing.jsonl").write_text("{\n"), "mixing.jsonl:1: not JSON"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"iteration": 1}\n'), "no 'consumed_samples'"),
    ],
    ids=["no ledger", "no signals", "empty ledger", "line", "json", "metrics"],
)
def test_what_is_no_run_directory_is_refused(damage, message, tmp_path, capsys):
    folder = fake_run(4).write(tmp_path / "run")
    damage(folder)
    with pytest.raises(InputError, match=message):
        read_run(folder) and verify(folder)
    assert main(["verify", str(folder)]) == 2


def test_a_run_of_an_earlier_version_is_refused_in_plain_words(tmp_path):
    folder = fake_run(4).write(tmp_path / "run")
    (folder / "signals.bin").unlink()
    line = {"iteration": 3, "note": None, "events": [], "signal": {"half_counts": [[[[1]]]]}}
    (folder / "mixing.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="written by an earlier version"):
        verify(folder)


def test_the_replay_holds_one_chunk_however_long_the_run():
    line = fake_run().records().ledger[0]
    replay = Replay(stage_line(line, "here"))
    replay.go_to(10_000)
    assert len(replay._row_N) == line["chunk_size"]
    assert replay.cursor.drawn_D.sum() == replay.sample == 10_000
