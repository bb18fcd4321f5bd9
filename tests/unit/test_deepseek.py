"""DeepSeek-V2 and V3: settings from config.json and back, the weight map, what is refused."""

import json

import pytest
import torch

from megatron_dynmix.config.hugging_face import hugging_face_config, model_settings
from megatron_dynmix.config.presets import COMMON
from megatron_dynmix.convert.families import weight_map
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.tensors import AsHuggingFace, AsMegatron, InMemory
from megatron_dynmix.errors import InputError
from tests.deepseek_models import MODELS, YARN, tiny_model


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_read_and_back_is_bit_equal(name, fused, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path, save_original_format=not fused)
    folder = HuggingFaceFolder(tmp_path)
    names = folder.weight_map(256)
    assert names.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    megatron = AsMegatron(folder, names)
    read = {key: megatron.read(key, (0,) * len(shape), shape) for key, shape in megatron.shapes.items()}
    back = AsHuggingFace(InMemory(read), names)
    for key, shape in folder.shapes.items():
        zeros = (0,) * len(shape)
        assert torch.equal(back.read(key, zeros, shape), folder.read(key, zeros, shape)), key


@pytest.mark.parametrize("name", MODELS)
def test_settings_go_back_to_a_config_that_says_the_same(name):
    config = json.loads(tiny_model(name).config.to_json_string(use_diff=False))
    settings = model_settings(config)
    written = hugging_face_config({**COMMON, **settings})
    assert written["model_type"] == MODELS[name][0]
    assert model_settings(written) == settings


def test_parameters_of_the_published_v2_lite():
    config = {
        **{"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27},
        **{"intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64},
        **{"n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None},
        **{"num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "topk_method": "greedy", "max_position_embeddings": 163840},
        **{"rms_norm_eps": 1e-6, "rope_scaling": {**YARN, "type": "yarn", "factor": 40}},
    }
    assert weight_map(model_settings(config), config).parameters == 15_706_484_224


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("V2-Lite", {"topk_method": "group_limited_greedy"}, "topk_method"),
        ("V3", {"num_experts_per_tok": 6}, "topk_group"),
        ("V3", {"scoring_func": "softmax"}, "scoring_func"),
        ("V3", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("V3", {"kv_lora_rank": None}, "kv_lora_rank"),
        ("V3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ("V3", {"quantization_config": {"quant_method": "fp8"}}, "quantis"),
    ],
)
def test_what_is_not_computed_the_same_is_refused(name, changes, message):
    config = json.loads(tiny_model(name).config.to_json_string(use_diff=False))
    with pytest.raises(InputError, match=message):
        model_settings({**config, **changes})
