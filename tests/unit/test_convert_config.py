"""config.json <-> the model section: published models, there and back, and what is refused."""

import dataclasses
import json

import convert_fixtures as tiny
import pytest
import transformers
from config_fixtures import load
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmix.config.hugging_face import PLAIN, hugging_face_config, model_settings
from megatron_dynmix.config.megatron import transformer_config
from megatron_dynmix.config.presets import COMMON, PRESETS
from megatron_dynmix.config.run_config import ModelConfig
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.errors import InputError
from megatron_dynmix.families import known_as
from tests import published_models as published
from tests.deepseek_models import DEEPSEEK_V2_LITE, DEEPSEEK_V3

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
MIXTRAL_8X22B = {
    **MIXTRAL_8X7B,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
    "router_aux_loss_coef": 0.001,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN15_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLMOE_1B_7B = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 50304,
}
PUBLISHED = {
    "mixtral-8x7b": (MIXTRAL_8X7B, 46_702_792_704),
    "mixtral-8x22b": (MIXTRAL_8X22B, 140_620_634_112),
    "qwen3-30b-a3b": (QWEN3_30B_A3B, 30_532_122_624),
    "olmoe-1b-7b": (OLMOE_1B_7B, 6_919_161_856),
    "qwen1.5-moe-a2.7b": (QWEN15_MOE, 14_315_784_192),
    # of which the corrections of the routers' choices are not learned by gradients
    "glm-4.5-air": (published.GLM_4_5_AIR, 106_852_251_264),
    "glm-4.5": (published.GLM_4_5, 352_797_829_024),
    "glm-4.6": (published.GLM_4_6, 352_797_829_024),
    "glm-4.7-flash": (published.GLM_4_7_FLASH, 29_943_393_920),
    "kimi-k2": (published.KIMI_K2, 1_026_408_232_448),
    "moonlight-16b-a3b": (published.MOONLIGHT, 15_960_110_208),
    "minimax-m2": (published.MINIMAX_M2, 228_689_764_864),
    "dots.llm1": (published.DOTS_LLM1, 142_774_381_696),
    "granite-3.0-1b-a400m": (published.GRANITE_1B_A400M, 1_334_625_280),
    "granite-3.0-3b-a800m": (published.GRANITE_3B_A800M, 3_298_788_864),
    "granite-3.1-1b-a400m": (published.GRANITE_31_1B_A400M, 1_334_625_280),
    "granite-3.1-3b-a800m": (published.GRANITE_31_3B_A800M, 3_298_788_864),
}
WRITTEN = {"glm-4.7-flash": "deepseek_v3"}
"""A preset that more than one family computes -> the first of them."""
QWEN2_57B = {
    **QWEN15_MOE,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 65536,
}
QWEN3_235B = {
    **QWEN3_30B_A3B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 94,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
QWEN3_CODER = {
    **QWEN3_30B_A3B,
    "intermediate_size": 5472,
    "max_position_embeddings": 262144,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
OTHERS = {
    "qwen2-57b-a14b": (QWEN2_57B, 57_408_658_944),
    "qwen3-235b-a22b": (QWEN3_235B, 235_093_634_560),
    "qwen3-coder-30b-a3b": (QWEN3_CODER, 30_532_122_624),
    "mixtral with a window that is as long as rows": (
        {**MIXTRAL_8X7B, "sliding_window": 32768, "head_dim": None, "output_router_logits": False},
        46_702_792_704,
    ),
    "olmoe-1b-7b-0125": ({**OLMOE_1B_7B, "pad_token_id": 1, "use_cache": False}, 6_919_161_856),
    "deepseek-v2-lite": (DEEPSEEK_V2_LITE, 15_706_484_224),
    "deepseek-v3": (DEEPSEEK_V3, 671_026_419_200),
}
"""Published models of which there is no preset."""
CASES = [
    *((family, {}) for family in tiny.FAMILIES),
    ("mixtral", {"tie_word_embeddings": True, "rope_theta": 500.0}),
    ("qwen2_moe", {**tiny.MIXED, "qkv_bias": False}),
    ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": False}),
    ("olmoe", {"norm_topk_prob": True, "attention_dropout": 0.25}),
]


def resolved(config):
    """What Megatron-Core makes of a configuration; functions that initialise weights are never equal."""
    values = vars(transformer_config(config)).items()
    return {name: value for name, value in values if not name.endswith("init_method")}


@pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_models(preset, tmp_path):
    config, total = PUBLISHED[preset]
    assert weight_map({**COMMON, **PRESETS[preset]}, config).parameters == total
    ours, theirs = (
        load(tmp_path, {"model": values})
        for values in ({"preset": preset}, {"preset": None, **model_settings(config)})
    )
    assert resolved(ours) == resolved(theirs), "the preset is the published config.json"
    own = ("vocab_size", "max_position_embeddings", "rotary_base", "rotary_percent")
    own += ("qk_layernorm_full_width", "latent_layernorm_epsilon", "untie_embeddings_and_output_weights")
    own += ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    for name in own:
        assert getattr(ours.model, name) == getattr(theirs.model, name), name
    written = hugging_face_config(ours.model.flat())["model_type"]
    assert written == WRITTEN.get(preset, known_as(config["model_type"]))


@pytest.mark.parametrize("name", {**PUBLISHED, **OTHERS})
def test_what_is_published_is_taken_however_transformers_writes_it(name):
    config, total = {**PUBLISHED, **OTHERS}[name]
    read = model_settings(config)
    assert weight_map(read, config, fused_experts=True).parameters == total
    scaling = config.get("rope_scaling") or {"type": "default"}
    rope = {**scaling, "rope_type": scaling["type"], "rope_theta": config["rope_theta"]}
    changed = {key: value for key, value in config.items() if not key.startswith(("rope_", "torch_dtype"))}
    assert model_settings({**changed, "dtype": "bfloat16", "rope_parameters": rope}) == read
    assert (
        model_settings({**changed, "rope_parameters": rope, "rope_scaling": None, "architectures": None})
        == read
    )


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_the_map_of_a_large_model_is_made_in_seconds(fused):
    # 128 experts in each of 48 layers: 18,432 matrices of experts; the constructor checks every one
    config = QWEN3_30B_A3B
    tensors = weight_map(model_settings(config), config, fused_experts=fused, padded_vocab=152064)
    assert tensors.parameters == PUBLISHED["qwen3-30b-a3b"][1]
    assert len(tensors.hf_shapes) == 3 + 48 * (9 + (2 if fused else 3 * 128))


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_there_and_back(family, changes):
    config = json.loads(tiny.tiny_config(family, **changes).to_json_string())
    read = model_settings(config)
    written = hugging_face_config(read)
    assert model_settings(written) == read
    # what transformers makes of it computes the same: all but what only training or generation reads
    opened = transformers.AutoConfig.for_model(**written).to_dict()
    ignored = {"decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef", "sliding_window", "dtype"}
    ignored |= {"bos_token_id", "eos_token_id", "architectures", "layer_types", "head_dim"}
    assert written["model_type"] == family
    assert {name: opened[name] for name in config.keys() - ignored} == {
        name: config[name] for name in config.keys() - ignored
    }


def test_our_own_tiny_model_is_a_mixtral(tmp_path):
    config = hugging_face_config(load(tmp_path, {}).model.flat())
    assert config["architectures"] == ["MixtralForCausalLM"] and config["num_local_experts"] == 8
    assert config["eos_token_id"] is None and config["rope_theta"] == 10000.0


def test_what_is_plain_is_what_megatron_core_does_by_itself():
    known = {item.name: item.default for item in dataclasses.fields(TransformerConfig)}
    known |= {item.name: item.default for item in dataclasses.fields(ModelConfig)}
    named = {
        "moe_router_score_function": "softmax",
        "softmax_type": "vanilla",
        "router_network": "linear",
        "activation": "silu",
        "glu_linear_offset": 0.0,
        "rotary_percent": 1.0,
        **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
    }
    for name in PLAIN:
        assert known[name] == named[name] if name in named else known[name] in (None, False), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_router_score_function": "sigmoid"}, "mixtral has no moe_router_score_function 'sigmoid'"),
        ({"num_moe_experts": None}, "num_moe_experts None"),
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm'"),
        ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq \[0, 1\]"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "known .*(qk_layernorm|add_qkv_bias) True"),
    ],
)
def test_a_model_of_no_family_is_not_written(changes, message):
    with pytest.raises(InputError, match=message):
        hugging_face_config({**COMMON, **PRESETS["tiny"], **changes})


REFUSED = [
    (MIXTRAL_8X7B, {"model_type": "llama"}, r"model_type is 'llama'.*mixtral \(MixtralForCausalLM\)"),
    (MIXTRAL_8X7B, {"model_type": None}, "model_type is None"),
    (MIXTRAL_8X7B, {"architectures": ["MixtralForSequenceClassification"]}, "only language models"),
    (MIXTRAL_8X7B, {"sliding_window": 4096}, "sliding_window is 4096"),
    (MIXTRAL_8X7B, {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1, and only 0.0"),
    (MIXTRAL_8X7B, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (MIXTRAL_8X7B, {"hidden_size": None}, "hidden_size is not in it"),
    (MIXTRAL_8X7B, {"hidden_size": "4096"}, "hidden_size is '4096'; it must be a whole number"),
    (MIXTRAL_8X7B, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    (MIXTRAL_8X7B, {"num_key_value_heads": 5}, "num_key_value_heads is 5, which does not divide"),
    (MIXTRAL_8X7B, {"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be"),
    (MIXTRAL_8X7B, {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
    (MIXTRAL_8X7B, {"quantization_config": {"quant_method": "awq"}}, "quantization_config says awq"),
    (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and there are 8 experts"),
    (MIXTRAL_8X7B, {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a number above 0"),
    (MIXTRAL_8X7B, {"attention_dropout": 2}, "attention_dropout is 2; it must be"),
    (MIXTRAL_8X7B, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or"),
    (MIXTRAL_8X7B, {"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must hold settings by name"),
    (MIXTRAL_8X7B, {"rope_theta": "big"}, "rope_theta is 'big'"),
    (MIXTRAL_8X7B, {"rope_theta": -1.0}, "rope_theta is -1.0; it must be a number above 0"),
    (QWEN3_30B_A3B, {"rope_scaling": {"type": "yarn"}}, "is of type yarn and says no factor"),
    (QWEN3_30B_A3B, {"rope_scaling": {"type": "linear"}}, "factor of rope_scaling is None; it must be"),
    (
        QWEN3_30B_A3B,
        {"rope_scaling": {"type": "yarn", "factor": 4, "finetuned": True}},
        "says finetuned True",
    ),
    (QWEN3_30B_A3B, {"rope_scaling": {"type": "yarn", "factor": 4, "truncate": "no"}}, "says truncate 'no'"),
    (QWEN3_30B_A3B, {"rope_scaling": {"type": "yarn", "factor": 4, "mscale": "1"}}, "mscale is '1'; it must"),
    (QWEN3_30B_A3B, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "told of full_attention"),
    *(
        (
            MIXTRAL_8X7B,
            {"rope_scaling": {"rope_type": kind, "factor": 4.0}},
            f"is of type {kind}; only",
        )
        for kind in ("dynamic", "llama3", "longrope", "proportional", None)
    ),
    (QWEN3_30B_A3B, {"attention_bias": True}, "attention_bias is True"),
    (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    (QWEN3_30B_A3B, {"mlp_only_layers": list(range(48))}, "leave no layer with experts"),
    (QWEN3_30B_A3B, {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; it must be true or false"),
    (QWEN3_30B_A3B, {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window is 4096"),
    (QWEN3_30B_A3B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (OLMOE_1B_7B, {"clip_qkv": 8.0}, "clip_qkv is 8.0, and only None"),
]


@pytest.mark.parametrize(("config", "changes", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_we_cannot_run_is_refused(config, changes, message):
    with pytest.raises(InputError, match=message):
        model_settings({**config, **changes})


def test_a_window_over_the_whole_sequence_is_none():
    assert model_settings({**MIXTRAL_8X7B, "sliding_window": 32768}) == model_settings(MIXTRAL_8X7B)
