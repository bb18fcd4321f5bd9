"""With which other settings a run may go on."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from config_fixtures import good_settings, load

from megatron_dynmix import platform
from megatron_dynmix.errors import InputError

platform.start()
from megatron_dynmix.checkpoint.run_state import Progress  # noqa: E402
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
        ({}, {"load_routers": "attention"}, "mixing.load_routers was mlp"),
    ],
)
def test_what_could_have_no_effect_is_refused(changes, before, after, part):
    with pytest.raises(InputError) as caught:
        changes(before, after)
    assert part in str(caught.value) and "resume with" in str(caught.value)


def test_a_setting_that_the_run_did_not_know_had_its_default(tmp_path, monkeypatch):
    content = good_settings(tmp_path)
    saved = resume.identity(load(tmp_path, content), [])
    del saved.config["data"]["segment_multiple"]
    monkeypatch.setattr(resume, "has_checkpoint", lambda run_dir: True)
    monkeypatch.setattr(resume, "read_run_state", lambda source: saved)
    again = ([], tmp_path, "must")
    assert resume.check_resume(load(tmp_path, content), *again, source=Path("iter_0000010")) == []
    content["data"]["segment_multiple"] = 4
    with pytest.raises(InputError, match=r"data.segment_multiple was 1 .* order of the rows; resume with 1"):
        resume.check_resume(load(tmp_path, content), *again, source=Path("iter_0000010"))


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


@pytest.fixture
def said(tmp_path, monkeypatch):
    """What is said where a run goes on from iteration 4 with other settings: {section: settings}."""
    progress = Progress(4, 32, torch.zeros(1), batches=((4, 8),))

    def config_of(*changes):
        content = good_settings(tmp_path)
        content["training"] |= {"train_iters": 8, "global_batch_size": 8, "micro_batch_size": 2}
        content["optimizer"] = {"lr": 1e-3, "lr_warmup_iters": 2}
        for section, settings in (item for change in changes for item in change.items()):
            content[section] |= settings
        return load(tmp_path, content)

    def check(after, before=None):
        saved = resume.identity(config_of(before or {}), [])
        state = SimpleNamespace(**vars(saved), progress=progress)
        monkeypatch.setattr(resume, "has_checkpoint", lambda run_dir: True)
        monkeypatch.setattr(resume, "read_run_state", lambda source: state)
        now = config_of(before or {}, after)
        return resume.check_resume(now, [], tmp_path, "must", source=Path("iter_0000004"))

    return check


@pytest.mark.parametrize(
    "after, line",
    [
        ({"training": {"global_batch_size": 4}}, "5.000000E-04; after iteration 8: 0"),
        ({"training": {"train_iters": 6}}, "5.000000E-04; after iteration 6: 0"),
        ({"optimizer": {"lr": 2e-3}}, "1.500000E-03; after iteration 8: 0"),
        ({"optimizer": {"min_lr": 1e-4}}, "7.750000E-04; after iteration 8: 1.000000E-04"),
        ({"optimizer": {"lr_decay_style": "constant"}}, "1.000000E-03; after iteration 8: 1"),
        ({"optimizer": {"lr_warmup_iters": 5}}, "8.000000E-04"),
    ],
)  # fmt: skip
def test_the_learning_rate_that_follows_is_said(said, after, line):
    lines = said(after)
    assert [text for text in lines if text.startswith("learning rate")] == [lines[-1]]
    assert lines[-1].startswith(f"learning rate after iteration 4: 7.500000E-04 -> {line}")


def test_settings_that_leave_the_learning_rate_alone_say_nothing_of_it(said):
    assert said({"mixing": {"max_kl_step": 0.1}}) == ["mixing.max_kl_step: None -> 0.1"]


def test_that_the_balance_depends_on_the_micro_batch_is_said(said):
    note = (
        "with another micro_batch_size, the experts are balanced over other tokens (those of a micro-batch): "
    )
    note += "the weights will differ a little"
    change = {"training": {"micro_batch_size": 1}}
    assert said(change) == ["training.micro_batch_size: 2 -> 1", note]
    for balancing, told in [
        ({"moe_router_load_balancing_type": "none"}, False),
        ({"moe_aux_loss_coeff": 0.0}, False),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, False),
        ({"moe_router_load_balancing_type": "global_aux_loss"}, True),
        ({"moe_router_load_balancing_type": "none", "moe_expert_capacity_factor": 1.0}, True),
    ]:
        assert (len(said(change, {"model": balancing})) == 2) == told, balancing
