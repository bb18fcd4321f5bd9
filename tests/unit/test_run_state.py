"""`run_state.json`: what is written comes back bit for bit, and nothing else is taken for it."""

import json

import pytest
from run_fixtures import fake_run

from megatron_dynmix.checkpoint.run_state import (
    FORMAT_VERSION,
    RUN_STATE,
    Damaged,
    RunState,
    SavedModel,
    read_run_state,
    read_saved,
)
from megatron_dynmix.errors import InputError

STATE = fake_run(7).state()


def write(folder, content):
    (folder / RUN_STATE).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_run_state_comes_back_as_it_was(tmp_path):
    state = read_run_state(write(tmp_path, STATE.text()))
    assert type(read_saved(tmp_path)) is RunState
    assert state.text() == STATE.text() and json.loads(state.text())["format_version"] == FORMAT_VERSION
    assert state.mix.blend.stages == STATE.mix.blend.stages and state.drawn == STATE.drawn
    assert state.log_interval.seconds == 0.5 and state.progress.batches == ((7, 8),)
    assert state.log_interval.micro_batches_here == 0, "no tracker of Megatron-Core's survives a restart"
    assert state.mix.interval_counts.dtype == STATE.mix.interval_counts.dtype


def test_a_mix_resumes_from_what_was_written(tmp_path):
    whole, resumed = fake_run(7), fake_run()
    mix = read_run_state(write(tmp_path, whole.state().text())).mix
    resumed.blend.resume(mix.blend)
    resumed.controller.resume(mix.controller)
    for run in (whole, resumed):
        run.blend.advance_to(56)
    assert resumed.blend.draws(56, 120) == whole.blend.draws(56, 120)
    assert resumed.controller.state.to_json() == whole.controller.state.to_json()


def test_converted_weights_have_a_model_and_no_run(tmp_path):
    write(tmp_path, SavedModel(config={"model": {"num_layers": 2}}).text())
    saved = read_saved(tmp_path)
    assert type(saved) is SavedModel and saved.config == {"model": {"num_layers": 2}}
    with pytest.raises(InputError, match=r"converted weights.*--pretrained-checkpoint"):
        read_run_state(tmp_path)


WHOLE = json.loads(STATE.text())
WITHOUT_STAGES = {**WHOLE["mix"]["blend"], "stages": None}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        {**WHOLE, "format_version": "3"},
        {name: value for name, value in WHOLE.items() if name != "progress"},
        {name: value for name, value in WHOLE.items() if name != "config"},
        {**WHOLE, "other": 1},
        {**WHOLE, "drawn": {"first_sample": 0}},
        {**WHOLE, "mix": {**WHOLE["mix"], "blend": WITHOUT_STAGES}},
        {**WHOLE, "mix": {**WHOLE["mix"], "interval_counts": "many"}},
        {**WHOLE, "mix": []},
    ],
)
def test_what_is_no_run_state_is_damaged(content, tmp_path):
    with pytest.raises(Damaged, match=RUN_STATE):
        read_saved(write(tmp_path, content))


@pytest.mark.parametrize(("version", "age"), [(FORMAT_VERSION + 1, "newer"), (FORMAT_VERSION - 1, "older")])
def test_another_version_is_named_before_anything_else_is_read(version, age, tmp_path):
    with pytest.raises(InputError, match=f"written by an? {age} version .format {version}"):
        read_saved(write(tmp_path, {"format_version": version}))
