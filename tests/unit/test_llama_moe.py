"""LLaMA-MoE v1: its settings from config.json and back, its weight map, what is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from config_fixtures import good_settings, load
from convert_fixtures import InMemory

from megatron_dynmix.config.check import check_run
from megatron_dynmix.config.hugging_face import hugging_face_config, model_settings
from megatron_dynmix.config.load import load_config
from megatron_dynmix.config.megatron import optimizer_config
from megatron_dynmix.config.presets import COMMON, PRESETS
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.tensors import as_hugging_face, as_megatron
from megatron_dynmix.data.prepare.jinja import compiled
from megatron_dynmix.errors import InputError
from tests.llama_moe_reference import LlamaMoE, small_config

EXAMPLE = Path(__file__).parents[2] / "examples/llama_moe_paper"
SMALL = {
    **COMMON,
    **PRESETS["llama-moe-3.5b-2-8"],
    "num_layers": 2,
    "hidden_size": 32,
    "vocab_size": 1031,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "num_moe_experts": 4,
}
PARAMETERS = {
    "llama-moe-3.5b-2-8": 6_740_514_816,
    "llama-moe-3.5b-4-16": 6_742_618_112,
    "llama-moe-3.0b-2-16": 6_742_618_112,
}


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
def test_the_map_names_every_tensor_and_back_is_bit_equal(noise):
    config = small_config(gate_add_noise=noise)
    state = LlamaMoE(config).state_dict()
    settings = {**SMALL, "router_noise": "training" if noise else None}
    tensors = weight_map(settings, config, padded_vocab=1152)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == dict(tensors.hf_shapes)
    assert ("decoder.layers.mlp.router.noise_weight" in tensors.megatron_shapes) == noise
    megatron = as_megatron(InMemory(state), tensors)
    read = {name: megatron.read(name, (0,) * len(shape), shape) for name, shape in megatron.shapes.items()}
    back = as_hugging_face(InMemory(read), tensors)
    for name, shape in back.shapes.items():
        assert torch.equal(back.read(name, (0,) * len(shape), shape), state[name]), name


@pytest.mark.parametrize("preset", PARAMETERS)
def test_preset_has_the_parameters_of_llama_2_7b_and_its_routers(preset):
    # LLaMA-2 7B's 6,738,415,616, and for each of 32 layers two matrices [E, 4096] and one [E, E]
    tensors = weight_map({**COMMON, **PRESETS[preset]}, {"model_type": "llama_moe"})
    experts = PRESETS[preset]["num_moe_experts"]
    assert tensors.parameters == 6_738_415_616 + 32 * (2 * experts * 4096 + experts**2)
    assert tensors.parameters == PARAMETERS[preset]
    assert PRESETS[preset]["ffn_hidden_size"] * experts == 11008


REFUSED = {
    "router without experts": (
        {
            "model": {"router_network": "mlp", "num_moe_experts": None},
            "parallel": {"expert_model_parallel_size": 1},
        },
        "the model is dense",
    ),
    "noise without the network": ({"model": {"router_noise": "training"}}, "set router_network to mlp"),
    "an unknown network": ({"model": {"router_network": "cosine"}}, "one of linear, mlp"),
    "weight decay of frozen gates": (
        {"model": {"freeze_expert_gate": True}, "optimizer": {"weight_decay": 0.1}},
        "set weight_decay to 0",
    ),
    "gates that are not there": (
        {"model": {"freeze_expert_gate": True, "gated_linear_unit": False}, "optimizer": {"weight_decay": 0}},
        "no experts with a gate projection",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_work_are_refused(name, tmp_path):
    changes, message = REFUSED[name]
    settings = copy.deepcopy(good_settings(tmp_path))
    for section, values in changes.items():
        settings.setdefault(section, {}).update(values)
    with pytest.raises(InputError, match=message):
        check_run(load(tmp_path, settings), world_size=2)


def test_settings_come_from_the_published_config_and_go_back():
    config = small_config()
    settings = model_settings(config)
    for name in ("router_network", "router_noise", "moe_router_topk", "ffn_hidden_size", "num_layers"):
        assert settings[name] == SMALL[name], name
    assert settings["moe_router_topk_scaling_factor"] == 2.0 and not settings["moe_router_pre_softmax"]
    written = hugging_face_config({**COMMON, **settings, "attention_dropout": 0.0})
    training_only = {"gate_use_balance", "gate_balance_loss_weight", "torch_dtype"}
    without_effect = {"capacity_factor", "drop_tokens", "dropped_padding", "pretraining_tp", "rope_scaling"}
    for name in config.keys() - training_only - without_effect:
        assert written[name] == config[name], name
    assert model_settings(written) == settings


def test_a_model_without_noise_weights_and_one_that_leaves_them_idle():
    quiet = model_settings(small_config(gate_add_noise=False))
    assert quiet["router_noise"] is None and not hugging_face_config(quiet)["gate_add_noise"]
    idle = {**model_settings(small_config()), "router_noise": "idle"}
    assert hugging_face_config(idle)["gate_add_noise"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gate_network", "linear"),
        ("gate_use_softmax", False),
        ("gate_noise_epsilon", 0.1),
        ("gate_type", "SwitchBalancedGate"),
        ("calculator_type", "SwitchDropTokenCalculator"),
        ("multiply_gate_scores", False),
        ("add_weight_norm", True),
        ("attention_bias", True),
        ("size_experts", [[20, 28, 24, 24]] * 2),
        ("intermediate_size", 97),
        ("score_scale_factor", [2.0, 4.0]),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("hidden_act", "gelu"),
    ],
)
def test_what_the_router_does_not_compute_is_refused(name, value):
    with pytest.raises(InputError, match=name):
        model_settings({**small_config(), name: value})


def test_linear_scaling_is_written_in_the_two_words_that_the_published_code_takes():
    scaling = {"type": "linear", "factor": 2.0}
    settings = {**COMMON, **model_settings({**small_config(), "rope_scaling": scaling})}
    assert settings["rotary_seq_len_interpolation_factor"] == 2.0
    assert hugging_face_config(settings)["rope_scaling"] == scaling


def test_the_papers_example_is_the_published_setting(tmp_path, monkeypatch):
    published = {
        **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
        **{"num_experts": 8, "score_scale_factor": 4.0},
    }
    (tmp_path / "config.json").write_text(json.dumps(small_config(**published)))
    for source in ("chat", "general", "math", "code"):
        (tmp_path / source).mkdir()
        for name in ("train.jsonl", "dev.jsonl"):
            (tmp_path / source / name).touch()
    monkeypatch.setenv("LLAMA_MOE", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path))
    config = load_config(EXAMPLE / "RUN.yaml")
    check_run(config, world_size=4)
    preset = {**COMMON, **PRESETS["llama-moe-3.5b-2-8"]}
    model = config.model.flat()
    ours = {"moe_token_dispatcher_type": "alltoall", "moe_aux_loss_coeff": 0.046}
    assert {name: model[name] for name in preset} == {**preset, **ours}
    assert model["freeze_router"] and model["freeze_expert_gate"]
    mixing = config.mixing
    assert mixing.probe_tokens == 80 * config.data.seq_length and not config.data.packing
    assert mixing.options == {
        **mixing.options,
        "eta": 10,
        "smoothing": 0.05,
        "metric": "l2",
        "layers": "last",
    }
    training, optimizer = config.training, config.optimizer
    assert (training.train_iters, training.global_batch_size, mixing.interval) == (2000, 128, 100)
    assert (
        optimizer.lr_warmup_iters == 0.03 * training.train_iters and optimizer_config(config).clip_grad == 0
    )


def test_the_papers_template_leaves_the_system_message_empty():
    template = compiled((EXAMPLE / "vicuna_empty_system.jinja").read_text())
    turns = [("system", "Be kind."), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text, _ = template.render(messages, tools=(), names={"bos_token": "<s>", "eos_token": "</s>"})
    assert text == "<s> USER: q ASSISTANT: a</s>USER: r ASSISTANT: b</s>"
