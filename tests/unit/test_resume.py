"""With which other settings a run may go on."""

from pathlib import Path

import pytest
from config_fixtures import good_settings, load

from megatron_dynmix import platform
from megatron_dynmix.errors import InputError

platform.start()
from megatron_dynmix.training import resume  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")


@pytest.fixture
def changes(tmp_path, monkeypatch):
    """What differs if a run goes on with other settings of the mixing section."""

    def with_mixing(mixing):
        content = good_settings(tmp_path)
        content["mixing"] |= mixing
        return load(tmp_path, content)

    def check(before, after):
        saved = resume.identity(with_mixing(before), [])
        monkeypatch.setattr(resume, "has_checkpoint", lambda run_dir: True)
        monkeypatch.setattr(resume, "read_run_state", lambda source: saved)
        return resume.check_resume(with_mixing(after), [], tmp_path, "must", source=Path("iter_0000010"))

    return check


@pytest.mark.parametrize(
    "before, after, part",
    [
        ({"strategy": "temperature"}, {"strategy": "temperature", "temperature": 2.0}, "mixing.temperature"),
        (
            {"strategy": "data-size", "sizes": {"a": 1}},
            {"strategy": "data-size", "sizes": {"a": 2}},
            "mixing.sizes",
        ),
        ({"strategy": "data-size"}, {"strategy": "data-size", "sizes": {"a": 2}}, "mixing.sizes"),
        ({"strategy": "gate-load"}, {"strategy": "data-size"}, "mixing.strategy was gate-load"),
        ({"unit": "tokens"}, {"unit": "examples"}, "mixing.unit was tokens"),
        ({}, {"load_mass": "probability"}, "mixing.load_mass was count"),
    ],
)
def test_what_could_have_no_effect_is_refused(changes, before, after, part):
    with pytest.raises(InputError) as caught:
        changes(before, after)
    assert part in str(caught.value) and "resume with" in str(caught.value)


@pytest.mark.parametrize(
    "before, after, change",
    [
        ({"strategy": "odm"}, {"strategy": "odm", "decay": 0.5}, "mixing.decay: 0.9 -> 0.5"),
        ({"strategy": "odm"}, {"strategy": "fixed"}, "mixing.strategy: odm -> fixed"),
        ({}, {"max_kl_step": 0.1}, "mixing.max_kl_step: None -> 0.1"),
    ],
)
def test_what_is_in_force_from_now_on_is_listed(changes, before, after, change):
    assert change in changes(before, after)
