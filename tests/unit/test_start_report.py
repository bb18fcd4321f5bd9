"""What a run says of its routers before it starts."""

import types

import pytest

from megatron_dynmix.training.start_report import router_lines
from tests.unit.config_fixtures import good_settings, load

BIAS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}


def report(name, tokens, trained):
    return types.SimpleNamespace(name=name, tokens=tokens, trained_tokens=trained)


REPORTS = [report("chat", 290, 100), report("math", 450, 100), report("math (probe)", 900, 100)]


def lines_of(folder, model, reports=REPORTS, **sections):
    settings = good_settings(folder)
    settings["model"] |= model
    for name, given in sections.items():
        settings[name] = {**settings.get(name, {}), **given}
    return "\n".join(router_lines(load(folder, settings), reports))


@pytest.mark.parametrize(
    "model, said",
    [
        ({}, "0.01 x load_balancing_loss, means"),
        ({"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.001}, "0.001 x z_loss, means"),
        (
            {
                "moe_router_load_balancing_type": ["seq_aux_loss", "aux_loss"],
                "moe_aux_loss_coeff": [1.0, 2.0],
            },
            "1.0 x seq_load_balancing_loss + 2.0 x load_balancing_loss, means",
        ),
    ],
)
def test_the_strength_of_auxiliary_losses_is_said(tmp_path, model, said):
    text = lines_of(tmp_path, model)
    assert said in text and "2.9 (chat) to 4.5 (math) times as strong" in text
    assert "times as strong" not in lines_of(tmp_path, model, [report("chat", 100, 99)])


def test_nothing_is_said_of_a_router_without_losses_or_of_a_dense_model(tmp_path):
    assert lines_of(tmp_path, {"moe_aux_loss_coeff": 0.0}) == ""


PRETRAINED = {"checkpoint": {"pretrained_checkpoint": "runs/before"}, "training": {"train_iters": 2000}}


def test_a_fine_tune_says_how_far_an_expert_bias_moves(tmp_path):
    text = lines_of(tmp_path, BIAS, **PRETRAINED)
    assert "runs/before moves: by 0.001 an iteration for each expert, so in 2000 by 2 at most" in text
    faster = {**BIAS, "moe_router_bias_update_rate": 0.02}
    assert "in 2000 by 40 at" in lines_of(tmp_path, faster, **PRETRAINED)


@pytest.mark.parametrize("kept", [{"freeze_router": True}, {"moe_router_bias_update_rate": 0.0}])
def test_nothing_is_said_of_an_expert_bias_that_is_kept_or_new(tmp_path, kept):
    assert "expert bias" not in lines_of(tmp_path, {**BIAS, **kept}, **PRETRAINED)
    assert "expert bias" not in lines_of(tmp_path, BIAS)
