"""MoLM (ModuleFormer): its settings from config.json and back, its weight map, what is refused."""

import pytest
import torch
from config_fixtures import good_settings, load
from convert_fixtures import InMemory

from megatron_dynmix.config.check import check_run
from megatron_dynmix.config.hugging_face import hugging_face_config, model_settings
from megatron_dynmix.config.presets import COMMON, PRESETS, complete_model
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.tensors import as_hugging_face, as_megatron
from megatron_dynmix.errors import InputError
from tests.molm_reference import ModuleFormer, save_folder, small_config

CONFIG = small_config()
PUBLISHED = {
    **{"vocab_size": 50295, "n_embd": 1024, "att_hidden": 1024, "ffd_hidden": 2048, "gating_size": 256},
    **{"n_att_experts": 16, "n_mlp_experts": 32, "n_layer": 24},
}
MODELS = {
    "molm-350m-4b": (small_config(**PUBLISHED, k_att=2, k_mlp=2), 4_142_526_464),
    "molm-700m-4b": (small_config(**PUBLISHED, k_att=4, k_mlp=4), 4_142_526_464),
    "molm-700m-8b": (small_config(**{**PUBLISHED, "n_layer": 48}, k_att=2, k_mlp=2), 8_182_046_720),
}


def test_the_map_names_every_tensor_and_back_is_bit_equal():
    state = ModuleFormer(CONFIG).state_dict()
    tensors = weight_map(model_settings(CONFIG), CONFIG, padded_vocab=1152)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == dict(tensors.hf_shapes)
    megatron = as_megatron(InMemory(state), tensors)
    read = {name: megatron.read(name, (0,) * len(shape), shape) for name, shape in megatron.shapes.items()}
    back = as_hugging_face(InMemory(read), tensors)
    for name, shape in back.shapes.items():
        assert torch.equal(back.read(name, (0,) * len(shape), shape), state[name]), name


def test_experts_of_mlps_are_transposed_slice_by_slice_in_both_directions():
    state = ModuleFormer(CONFIG).state_dict()
    tensors = weight_map(model_settings(CONFIG), CONFIG)
    megatron = as_megatron(InMemory(state), tensors)
    name = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    theirs = state["transformer.h.1.mlpf.experts.weight"]
    assert megatron.shapes[name] == (2, 8, 20, 24)
    part = megatron.read(name, (1, 5, 3, 2), (1, 2, 4, 7))
    assert part.is_contiguous() and torch.equal(part[0], theirs[5:7, 2:9, 3:7].mT)
    whole = {name: megatron.read(name, (0,) * len(shape), shape) for name, shape in megatron.shapes.items()}
    back = as_hugging_face(InMemory(whole), tensors)
    assert torch.equal(
        back.read("transformer.h.1.mlpf.experts.weight", (2, 3, 4), (3, 5, 6)), theirs[2:5, 3:8, 4:10]
    )


@pytest.mark.parametrize("preset", MODELS)
def test_presets_are_the_published_models(preset):
    config, parameters = MODELS[preset]
    assert weight_map({**COMMON, **PRESETS[preset]}, config).parameters == parameters
    settings = model_settings(config)
    assert {name: settings[name] for name in PRESETS[preset]} == PRESETS[preset]


@pytest.mark.parametrize("config", [CONFIG, *(config for config, _ in MODELS.values())])
def test_settings_come_from_the_published_config_and_go_back(config):
    settings = model_settings(config)
    written = hugging_face_config({**COMMON, **settings})
    assert model_settings(written) == settings
    training_only = {"aux_loss_type", "torch_dtype"}
    for name in config.keys() - training_only:
        assert written[name] == config[name], name
    assert written.keys() - config.keys() == {"bos_token_id", "eos_token_id", "pad_token_id"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_head", 2),
        ("att_hidden", 12),
        ("k_att", 6),
        ("k_mlp", 9),
        ("k_att", 0),
        ("gating_size", None),
        ("n_att_experts", 2.5),
        ("gate_type", "topk"),
        ("sample_topk", 1),
        ("moe_pdrop", 0.1),
        ("attn_pdrop", 0.1),
        ("activation_function", "relu"),
        ("hidden_size", 25),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, value):
    with pytest.raises(InputError, match="num_experts_per_tok" if name == "k_mlp" else name):
        model_settings({**CONFIG, name: value})


def test_what_config_json_does_not_say_is_that_of_the_published_code():
    spoken = {"n_head": 1, "att_hidden": 1024, "model_type": "moduleformer"}
    settings = model_settings(spoken)
    sizes = {"num_layers": 24, "attention_experts": 32, "num_moe_experts": 32, "num_attention_heads": 2}
    assert settings | {**sizes, "moe_router_topk": 2, "router_width": 256, "vocab_size": 50295} == settings
    with pytest.raises(InputError, match="n_head is 8, and only 1 can be run here"):
        model_settings({"model_type": "moduleformer"})


def test_a_folder_as_published_is_read_without_its_masks(tmp_path):
    folder = HuggingFaceFolder(save_folder(ModuleFormer(CONFIG), CONFIG, tmp_path / "model"))
    assert len(folder.computed) == 2 * CONFIG["n_layer"]
    assert not [name for name in folder.shapes if name.endswith(("mask", "cum_weight"))]


def test_a_model_without_a_preset_needs_no_rotary_base(tmp_path):
    settings = {name: value for name, value in model_settings(CONFIG).items() if name != "rotary_base"}
    assert complete_model({"preset": None, **settings})["attention_experts"] == 5
    with pytest.raises(InputError, match="rotary_base"):
        complete_model({"preset": None, **settings, "attention_experts": None})


MOLM = {
    **{
        "preset": "molm-350m-4b",
        "num_layers": 2,
        "hidden_size": 32,
        "kv_channels": 32,
        "ffn_hidden_size": 24,
    },
    **{"attention_experts": 5, "num_moe_experts": 6, "ffn_hidden_size": 24},
}
REFUSED = {
    "two heads of keys": ({"num_query_groups": 2}, "one head as wide as the model"),
    "projected keys": ({"kv_channels": 16}, "set num_query_groups to 1 and kv_channels to 32"),
    "more than there are": ({"num_attention_heads": 6}, "use 1 to 5"),
    "a dense layer": ({"moe_layer_freq": [0, 1]}, "not every layer's MLP has experts"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout is 0.1.*without a softmax; set it to 0"),
    "biases": ({"add_qkv_bias": True}, "add_qkv_bias is True.*no weights for it; leave it out"),
    "a window": ({"window_size": [64, 0]}, "window_size"),
    "a rotary base": ({"rotary_base": 10000.0}, "rotary_base with attention_experts.*leave it out"),
    "part of a head": ({"rotary_percent": 0.5}, "rotary_percent with attention_experts"),
    "fp8": ({"fp8": "hybrid"}, "fp8 is hybrid.*own precision"),
    "scores again": ({"recompute_granularity": "selective"}, r"name others, such as \[moe, layernorm\]"),
    "no width": ({"router_width": None}, "router_width is None with router_network gelu"),
    "a width of nothing": ({"router_network": "linear"}, "router_width is 256 with router_network linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_attention_experts_do_not_go_with_is_refused(name, tmp_path):
    changes, message = REFUSED[name]
    settings = good_settings(tmp_path)
    settings["model"] = MOLM
    check_run(load(tmp_path, settings), world_size=2)
    settings["model"] = {**MOLM, **changes}
    with pytest.raises(InputError, match=message):
        check_run(load(tmp_path, settings), world_size=2)
