"""A model's shape from a folder of Hugging Face's: what it says holds, and what contradicts it is refused."""

import json

import pytest
import yaml
from config_fixtures import good_settings, load

from megatron_dynmix.config.load import load_config, to_yaml
from megatron_dynmix.config.presets import PRESETS
from megatron_dynmix.errors import InputError

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "sliding_window": None,
}


@pytest.fixture(name="folder")
def folder_fixture(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    return folder


def model_of(tmp_path, model, flags=()):
    return load(tmp_path, {**good_settings(tmp_path), "model": model}, flags)


@pytest.mark.parametrize("name", ["preset", "load_hf"])
def test_the_folder_says_what_the_model_is_and_the_settings_how_it_is_trained(tmp_path, folder, name):
    config = model_of(tmp_path, {name: "./hf", "moe_aux_loss_coeff": 0.5, "num_layers": 3})
    model = config.model
    assert (model.preset, model.vocab_size, model.rotary_base) == (None, 131, 5e5)
    assert model.megatron["hidden_size"] == 48 and model.megatron["num_moe_experts"] == 4
    assert model.megatron["layernorm_epsilon"] == 1e-6 and model.megatron["normalization"] == "RMSNorm"
    assert model.megatron["moe_aux_loss_coeff"] == 0.5
    assert model.load_hf == (str(folder) if name == "load_hf" else None)


def test_what_was_resolved_is_the_same_where_the_folder_is_gone(tmp_path, folder):
    config = model_of(tmp_path, {"load_hf": "./hf", "moe_router_topk": 1})
    (folder / "config.json").unlink()
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    assert config.model.megatron["moe_router_topk"] == 1


def test_a_folder_that_was_converted_keeps_it_a_level_below(tmp_path, folder):
    (tmp_path / "converted").mkdir()
    folder.rename(tmp_path / "converted/hugging_face")
    flags = ["--preset", str(tmp_path / "converted")]
    assert model_of(tmp_path, {}, flags).model.megatron["hidden_size"] == 48


def test_the_tokenizer_of_the_model_is_taken_if_none_is_named(tmp_path, folder):
    settings = {**good_settings(tmp_path), "model": {"load_hf": "hf"}}
    assert load(tmp_path, settings).data.tokenizer == str(tmp_path / "tokenizer")
    del settings["data"]["tokenizer"]
    assert load(tmp_path, settings).data.tokenizer is None
    (folder / "tokenizer.json").touch()
    assert load(tmp_path, settings).data.tokenizer == str(folder)
    assert load(tmp_path, settings, ["--tokenizer", "null"]).data.tokenizer is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"hidden_size": 64},
            r"another shape than the settings: hidden_size 64 \(there 48\); leave them out",
        ),
        ({"qk_layernorm": True}, r"qk_layernorm True \(there False\)"),
        ({"moe_router_enable_expert_bias": True}, r"moe_router_enable_expert_bias True \(there None\)"),
        ({"router_noise": "idle"}, r"router_noise idle \(there None\)"),
        ({"preset": "mixtral-8x7b"}, r"model.preset is mixtral-8x7b, but model.load_hf is .*/hf, a model of"),
        ({"preset": "./nowhere"}, r"nowhere is no folder; give the folder of a Hugging Face model"),
    ],
    ids=str,
)
def test_settings_of_another_model_are_refused(tmp_path, folder, model, message):
    with pytest.raises(InputError, match=message):
        model_of(tmp_path, {"load_hf": "hf", **model})


def test_settings_that_say_the_same_are_no_contradiction(tmp_path, folder):
    model_of(tmp_path, {"load_hf": "hf", "qk_layernorm": False, "moe_layer_freq": 1, "hidden_size": 48})


def test_a_preset_and_a_folder_of_the_same_model_agree(tmp_path, folder):
    mixtral = PRESETS["mixtral-8x7b"]
    published = {
        **MIXTRAL,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
    (folder / "config.json").write_text(json.dumps(published))
    model = model_of(tmp_path, {"load_hf": "hf", "preset": "mixtral-8x7b"}).model
    assert model.megatron["ffn_hidden_size"] == mixtral["ffn_hidden_size"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "hf holds no config.json"),
        ("{", "config.json cannot be read"),
        ("[1]", r"holds \[1\] and no settings by name"),
        (json.dumps({**MIXTRAL, "model_type": "bert"}), "config.json: model_type is 'bert'"),
        (json.dumps({**MIXTRAL, "hidden_act": "relu"}), "config.json: hidden_act is 'relu'"),
    ],
    ids=str,
)
def test_a_folder_that_cannot_be_read_is_refused(tmp_path, folder, text, message):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        model_of(tmp_path, {"load_hf": "hf"})


def test_without_a_preset_the_settings_must_say_it_all(tmp_path):
    with pytest.raises(InputError, match=r"preset is null.* but num_layers, hidden_size, .* are missing"):
        model_of(tmp_path, {"preset": None})
    with pytest.raises(InputError, match=r"null.* but vocab_size is missing; set them, or name a preset"):
        model = yaml.safe_load(to_yaml(model_of(tmp_path, {})))["model"]
        model_of(tmp_path, {**model, "preset": None, "vocab_size": None})


def test_save_hf_is_at_the_end_or_every_time(tmp_path):
    assert model_of(tmp_path, {}, ["--save-hf", "every"]).checkpoint.save_hf == "every"
    assert model_of(tmp_path, {}).checkpoint.save_hf is None
    with pytest.raises(InputError, match="--save-hf is 'always'; it must be one of end, every"):
        model_of(tmp_path, {}, ["--save-hf", "always"])
