"""Families like DeepSeek, and Granite: names, settings, logits and gradients as those of transformers.

Axes: B rows, S positions, V vocabulary.
"""

import functools
import json
from itertools import pairwise

import convert_fixtures as tiny
import pytest
import torch
import transformers
from convert_fixtures import InMemory
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file, save_file

from megatron_dynmix import platform
from megatron_dynmix.checkpoint.tensors import own_slices
from megatron_dynmix.config.hugging_face import hugging_face_config, model_settings
from megatron_dynmix.config.presets import COMMON, complete_model
from megatron_dynmix.convert import logits
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.interleaved import as_families
from megatron_dynmix.convert.origin import model_of
from megatron_dynmix.convert.tensors import as_hugging_face, as_megatron
from megatron_dynmix.errors import InputError
from megatron_dynmix.families.granite_moe import SCALES
from megatron_dynmix.model.gpt import let_expert_biases_be_added
from megatron_dynmix.model.layers import segment_mask
from megatron_dynmix.platform.megatron_patches import rotate_packed_rows_on_the_device
from tests.family_models import MODELS, tiny_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Name, fused -> its model, and a folder of it."""

    @functools.cache
    def folder(name, fused=False):
        path = tmp_path_factory.mktemp("family")
        model = tiny_model(name) if name in MODELS else tiny.tiny_model(name)
        model.set_experts_implementation("eager")
        model.save_pretrained(path, save_original_format=not fused)
        return model, path

    return folder


def whole(tensors):
    return {name: tensors.read(name, (0,) * len(shape), shape) for name, shape in tensors.shapes.items()}


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_read_and_back_is_bit_equal(name, fused, folder_of):
    model, path = folder_of(name, fused)
    folder = HuggingFaceFolder(path)
    names = folder.weight_map(256)
    once = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # a tied one has two names
    assert names.parameters == sum(tensor.numel() for tensor in once.values())
    back = whole(as_hugging_face(InMemory(whole(as_megatron(folder, names))), names))
    read = whole(folder)
    assert back.keys() == read.keys() and all(torch.equal(back[key], read[key]) for key in read)


@pytest.mark.parametrize("name", [*MODELS, "gpt_oss"])
def test_logits_and_gradients_are_those_of_transformers(name, folder_of):
    model, path = folder_of(name)
    tokens_BS = logits.fixed_tokens(131, 25)
    expected_BSV = model.eval()(tokens_BS).logits
    loss(expected_BSV, tokens_BS).backward()
    gradients = {key: values.grad for key, values in model.named_parameters()}
    corrections = {key: values for key, values in model.named_buffers() if "correction_bias" in key}
    folder = HuggingFaceFolder(path)
    read = as_megatron(folder, folder.weight_map())
    fused = HuggingFaceFolder(folder_of(name, fused=True)[1]).weight_map()
    wanted = as_megatron(as_families(InMemory({**gradients, **corrections}), model.config.to_dict()), fused)
    platform.start()
    with logits.one_rank():
        layers = range(folder.settings["num_layers"])
        with torch.no_grad():
            section = model_of(complete_model({"preset": None, **folder.settings}))
            gpt = logits._build_cut(section, read, layers)
            let_expert_biases_be_added(gpt)  # as for training
        positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        found_BSV = gpt(tokens_BS, positions_BS, None)
        loss(found_BSV, tokens_BS).backward()
        for parameter in gpt.parameters():  # whose slices then are those of the gradients
            parameter.data.copy_(parameter.grad)
        slices = list(own_slices([gpt]))
    torch.testing.assert_close(found_BSV, expected_BSV, atol=TOLERANCE, rtol=0)
    assert {own.key for own in slices} == wanted.shapes.keys()
    for own in slices:
        shape = (1,) * own.prepend_axis_num + tuple(own.local_shape)
        expected = wanted.read(own.key, own.global_offset, shape).view(own.local_shape)
        torch.testing.assert_close(own.data, expected, atol=TOLERANCE, rtol=0, msg=own.key)


def loss(logits_BSV, tokens_BS):
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())


@pytest.mark.parametrize("joined", [False, True], ids=["masked", "joined"])
def test_segments_of_a_row_are_as_they_would_be_alone(joined, folder_of):
    """Of a model that rotates a part of each head: by a mask, and as Transformer Engine takes rows."""
    _, path = folder_of("GLM-4.5")
    folder = HuggingFaceFolder(path)
    section = model_of(complete_model({"preset": None, **folder.settings}))
    tokens_BS = logits.fixed_tokens(131, 24)[:1]
    ends = torch.tensor([0, 9, 24])
    segment_BS = (torch.arange(24) >= 9).long()[None]
    position_S = torch.arange(24)
    platform.start()
    rotate_packed_rows_on_the_device()
    with logits.one_rank(), torch.no_grad():
        gpt = logits._build_cut(section, as_megatron(folder, folder.weight_map()), range(3))
        alone = [gpt(tokens_BS[:, a:b], position_S[None, : b - a], None) for a, b in pairwise(ends.tolist())]
        inside_BS = position_S[None] - ends[segment_BS]
        if joined:
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=ends.int(),
                cu_seqlens_kv=ends.int(),
                max_seqlen_q=15,
                max_seqlen_kv=15,
            )
            found_BSV = gpt(tokens_BS, inside_BS, None, packed_seq_params=packed)
        else:
            found_BSV = gpt(tokens_BS, inside_BS, segment_mask(segment_BS, position_S, position_S))
    torch.testing.assert_close(found_BSV, torch.cat(alone, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_made_of_settings_alone_is_that_of_the_same_model(name, folder_of):
    model, _ = folder_of(name)
    settings = model_settings(json.loads(model.config.to_json_string(use_diff=False)))
    written = hugging_face_config({**COMMON, **settings})
    assert written["model_type"] == MODELS[name][0] and model_settings(written) == settings
    opened = transformers.AutoConfig.for_model(**written)
    other = transformers.AutoModelForCausalLM.from_config(
        opened, dtype=torch.float32, attn_implementation="eager"
    )
    other.load_state_dict(model.state_dict())
    other.set_experts_implementation("eager")
    tokens_BS = logits.fixed_tokens(131, 25)
    with torch.no_grad():
        assert torch.equal(other.eval()(tokens_BS).logits, model.eval()(tokens_BS).logits)


def test_the_usual_scale_of_scores_is_that_of_no_setting(folder_of):
    """So a model of our own that has Granite's other scales can be written."""
    settings = model_settings(folder_of("Granite")[0].config.to_dict() | {"attention_multiplier": 6**-0.5})
    assert settings["softmax_scale"] is None
    assert hugging_face_config({**COMMON, **settings})["attention_multiplier"] == 6**-0.5


@pytest.mark.parametrize("name", [*SCALES, "softmax_scale"])
def test_no_other_family_has_what_is_scaled(name, folder_of):
    usual = {**dict.fromkeys(SCALES, 1.0), "softmax_scale": None}
    settings = {**model_settings(folder_of("Granite")[0].config.to_dict()), **usual, name: 0.3}
    assert hugging_face_config({**COMMON, **settings, **usual})["model_type"] == "mixtral"
    assert hugging_face_config({**COMMON, **settings})["model_type"] == "granitemoe"


def test_kimi_is_a_deepseek_by_another_name(folder_of, tmp_path):
    model, _ = folder_of("Moonlight")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    folder = HuggingFaceFolder(tmp_path)
    assert folder.settings == model_settings(config)
    platform.start()
    read = as_megatron(folder, folder.weight_map())
    model_section = model_of(complete_model({"preset": None, **folder.settings}))
    verdict = logits.compare_logits(tmp_path, folder, read, model_section)
    assert verdict.passed and verdict.why_not is None, verdict.describe()


REFUSED = [
    (
        "GLM-4.5",
        {"norm_topk_prob": False},
        "norm_topk_prob is False, and only True can be run here: Megatron",
    ),
    ("GLM-4.5", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3 and topk_group 2"),
    ("GLM-4.5", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, and at most 1.0 means"),
    ("GLM-4.5", {"partial_rotary_factor": 0}, "partial_rotary_factor is 0; it must be a number above 0"),
    ("GLM-4.5", {"use_qk_norm": None}, "use_qk_norm is None; it must be true or false"),
    ("GLM-4.5-Air", {"first_k_dense_replace": 3}, "leaves none of 3 layers with experts"),
    ("GLM-4.7-Flash", {"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types leaves no layer with experts"),
    ("GLM-4.7-Flash", {"mlp_layer_types": ["sparse", "moe", "sparse"]}, "a list of dense or sparse for each"),
    ("GLM-4.7-Flash", {"mlp_layer_types": ["sparse"]}, "for each of 3 layers"),
    ("GLM-4.7-Flash", {"rope_interleave": False}, "rope_interleave is False, and only True"),
    ("GLM-4.7-Flash", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1.0"),
    ("Moonlight", {"num_key_value_heads": 2}, "every head has keys and values of its own"),
    ("dots.llm1", {"attention_bias": True}, "attention_bias is True, and only False can be run here: proj"),
    (
        "dots.llm1",
        {"sliding_window": 16, "max_window_layers": 1, "layer_types": None},
        "sliding_window is 16",
    ),
    ("MiniMax-M2", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1, and only 0.0"),
    ("MiniMax-M2", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1 and"),
    ("MiniMax-M2", {"rotary_dim": "6", "rope_parameters": None}, "rotary_dim is '6'; it must be a whole"),
    ("Granite", {"attention_multiplier": None}, "attention_multiplier is None; it must be a number above 0"),
    ("Granite", {"logits_scaling": 0}, "logits_scaling is 0; it must be a number above 0"),
    ("Granite", {"attention_bias": True}, "attention_bias is True, and only False can be run here: proj"),
    ("Granite", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' can be run here"),
    ("Granite", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1 and"),
    ("Granite, shared experts", {"shared_intermediate_size": 0}, "shared_intermediate_size is 0; it must be"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=str)
def test_what_cannot_be_run_is_refused(name, changes, message, folder_of):
    config = json.loads(folder_of(name)[0].config.to_json_string(use_diff=False))
    if "partial_rotary_factor" in changes:
        del config["rope_parameters"]
    with pytest.raises(InputError, match=message):
        model_settings({**config, **changes})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "holds no .*layers.2.self_attn.o_proj.weight"),
        (
            lambda tensors, name: tensors.update({name + "_too": tensors[name].clone()}),
            "_too, which the model of .* does not have",
        ),
        (lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}), "but .* says"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_tensors_that_are_not_those_of_the_model_are_refused(name, change, message, folder_of, tmp_path):
    folder_of(name)[0].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, next(key for key in tensors if key.endswith("layers.2.self_attn.o_proj.weight")))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        HuggingFaceFolder(tmp_path)
