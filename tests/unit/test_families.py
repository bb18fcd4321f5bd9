"""The name maps: every family there and back, bit for bit, and any slice of it."""

import functools
import json
import math

import convert_fixtures as tiny
import pytest
import torch
from convert_fixtures import InMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from megatron_dynmix.config.hugging_face import model_settings
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.model_map import weight_map as map_of
from megatron_dynmix.convert.tensors import as_hugging_face, as_megatron, box
from megatron_dynmix.errors import InputError
from megatron_dynmix.families import FAMILIES, known_as
from tests import deepseek_models, family_models

PADDED = 256
MODULES = (deepseek_models, family_models)
CASES = [
    *((family, {}) for family in tiny.FAMILIES),
    ("gpt_oss", {}),
    ("mixtral", {"tie_word_embeddings": True}),
    ("qwen2_moe", tiny.MIXED),
    ("qwen2_moe", {"qkv_bias": False, "num_key_value_heads": 6}),
    ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
]


def whole(tensors):
    return {
        name: tensors.read(name, (0,) * len(shape), tuple(shape)) for name, shape in tensors.shapes.items()
    }


def folder_of(family, changes, fused=False):
    return HuggingFaceFolder(tiny.tiny_folder(family, fused=fused, **changes))


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_there_and_back_is_bit_equal(family, changes, fused):
    folder = folder_of(family, changes, fused)
    weight_map = folder.weight_map(PADDED)
    megatron = whole(as_megatron(folder, weight_map))
    assert {name: tuple(tensor.shape) for name, tensor in megatron.items()} == weight_map.megatron_shapes
    assert not megatron["embedding.word_embeddings.weight"][131:].any(), "padding is zero"
    back = whole(as_hugging_face(InMemory(megatron), weight_map))
    original = whole(folder)
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_both_layouts_are_the_same_checkpoint(family, changes):
    one, other = (
        whole(as_megatron(folder, folder.weight_map()))
        for folder in (folder_of(family, changes), folder_of(family, changes, fused=True))
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@st.composite
def boxes(draw, shapes):
    """A tensor and a box in it."""
    name = draw(st.sampled_from(sorted(shapes)))
    offset = tuple(draw(st.integers(0, size - 1)) for size in shapes[name])
    shape = tuple(
        draw(st.integers(1, size - start)) for size, start in zip(shapes[name], offset, strict=True)
    )
    return name, offset, shape


@functools.cache
def both_worlds(family, fused):
    folder = folder_of(family, {}, fused)
    megatron = as_megatron(folder, folder.weight_map(PADDED))
    return folder, whole(folder), megatron, whole(megatron)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@settings(max_examples=25)
@given(data=st.data())
def test_a_slice_is_that_of_the_whole(family, fused, data):
    folder, hf, megatron, all_megatron = both_worlds(family, fused)
    name, offset, shape = data.draw(boxes(megatron.shapes))
    part = megatron.read(name, offset, shape)
    assert part.shape == shape
    assert torch.equal(part, all_megatron[name][box(offset, shape)])
    back = as_hugging_face(InMemory(all_megatron), folder.weight_map(PADDED))
    name, offset, shape = data.draw(boxes(folder.shapes))
    for tensors in (back, folder):
        assert torch.equal(tensors.read(name, offset, shape), hf[name][box(offset, shape)])


@st.composite
def model_sections(draw):
    """Settings of a small model of any sizes, and the model_type of its family."""
    small = st.integers(1, 5)
    heads_per_group, groups, width = draw(small), draw(small), draw(small)
    family = draw(st.sampled_from(tiny.FAMILIES))
    layers = draw(st.integers(1, 3))
    mixed = family in ("qwen2_moe", "qwen3_moe") and draw(st.booleans())
    section = {
        "num_layers": layers,
        "moe_layer_freq": [1, *(draw(st.integers(0, 1)) for _ in range(layers - 1))] if mixed else 1,
        "num_attention_heads": groups * heads_per_group,
        "num_query_groups": groups,
        "kv_channels": width,
        "moe_shared_expert_gate": family == "qwen2_moe",
        "add_qkv_bias": draw(st.booleans()),
        "untie_embeddings_and_output_weights": draw(st.booleans()),
    }
    names = ("vocab_size", "hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "num_moe_experts")
    section |= {name: draw(small) for name in (*names, "moe_shared_expert_intermediate_size")}
    return section, family


@settings(max_examples=60)
@given(drawn=model_sections(), padding=st.integers(0, 3), fused=st.booleans())
def test_any_sizes_there_and_back(drawn, padding, fused):
    section, family = drawn
    weight_map = map_of(
        section,
        {"model_type": family},
        fused_experts=fused,
        padded_vocab=section["vocab_size"] + padding,
    )
    total = weight_map.parameters
    numbers = iter(torch.arange(1, total + 1).split([math.prod(s) for s in weight_map.hf_shapes.values()]))
    hf = {name: next(numbers).view(shape) for name, shape in weight_map.hf_shapes.items()}
    megatron = whole(as_megatron(InMemory(hf), weight_map))
    held = torch.cat([tensor.flatten() for tensor in megatron.values()])
    assert torch.equal(held[held > 0].sort().values, torch.arange(1, total + 1)), "every number once"
    back = whole(as_hugging_face(InMemory(megatron), weight_map))
    assert all(torch.equal(back[name], hf[name]) for name in hf)


def test_rows_are_where_megatron_core_has_them():
    folder = folder_of("qwen2_moe", {})
    weight_map = folder.weight_map()
    megatron = whole(as_megatron(folder, weight_map))
    hf = whole(folder)
    layer = "model.layers.1."
    gate, up = (hf[f"{layer}mlp.experts.4.{part}_proj.weight"] for part in ("gate", "up"))
    fc1 = megatron["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert torch.equal(fc1[1, 4], torch.cat([gate, up])), "gate rows first"
    query, key, value = (hf[f"{layer}self_attn.{part}_proj.bias"] for part in "qkv")
    bias = megatron["decoder.layers.self_attention.linear_qkv.bias"][1]
    # 3 KV groups of 2 query heads, each head 6 wide
    of_group = [
        torch.cat([query[12 * group : 12 * (group + 1)], key[6 * group :][:6], value[6 * group :][:6]])
        for group in range(3)
    ]
    assert torch.equal(bias, torch.cat(of_group)), "query heads, key, value of each group"


def test_a_box_in_one_block_is_not_copied():
    folder = folder_of("mixtral", {})
    state = whole(folder)
    name = "model.layers.1.block_sparse_moe.experts.4.w2.weight"
    fc2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    part = as_megatron(InMemory(state), folder.weight_map()).read(fc2, (1, 4, 3, 0), (1, 1, 5, 14))
    assert part.untyped_storage().data_ptr() == state[name].untyped_storage().data_ptr()


class Counting(InMemory):
    numbers = 0

    def read(self, name, offset, shape):
        self.numbers += math.prod(shape)
        return super().read(name, offset, shape)


def test_no_more_is_read_than_was_asked_for():
    folder = folder_of("qwen3_moe", {}, fused=True)
    held = Counting(whole(folder))
    weight_map = folder.weight_map(PADDED)
    megatron = as_megatron(held, weight_map)
    megatron.read("decoder.layers.mlp.experts.experts.linear_fc1.weight", (1, 2, 3, 0), (1, 2, 20, 7))
    assert held.numbers == 2 * 20 * 7
    held.numbers = 0
    assert not megatron.read("output_layer.weight", (140, 0), (10, 30)).any() and held.numbers == 0


def test_groups_of_the_verdict():
    weight_map = folder_of("qwen2_moe", tiny.MIXED).weight_map()
    assert {weight_map.group_of(name) for name in weight_map.hf_shapes} == set(weight_map.groups.values())
    assert weight_map.group_of("model.layers.0.mlp.up_proj.weight") == "mlp"
    assert weight_map.group_of("model.layers.1.mlp.gate.weight") == "router"
    assert weight_map.group_of("model.layers.1.mlp.shared_expert_gate.weight") == "shared experts"


def test_what_no_family_has_is_refused():
    section = folder_of("mixtral", {}).settings
    with pytest.raises(InputError, match=r"model_type is 'gpt2'.*mixtral"):
        map_of(section, {"model_type": "gpt2"})
    with pytest.raises(InputError, match="one layout of its experts"):
        map_of(section, {"model_type": "llama_moe"}, fused_experts=True)


TINY = {family: (models, name) for models in MODULES for name, (family, _) in models.MODELS.items()}
"""Family -> the module that makes a tiny model of it, and the name it has there."""


@pytest.mark.parametrize("family", [name for name in FAMILIES if known_as(name) in CONFIG_MAPPING])
def test_what_stays_float32_is_what_transformers_keeps(family):
    models, name = TINY.get(known_as(family), (tiny, family))
    config = models.tiny_config(name)
    names = map_of(model_settings(json.loads(config.to_json_string(use_diff=False))), config.to_dict())
    kept = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_keep_in_fp32_modules_strict", None) or ()
    assert {name.rpartition(".")[2] for name in names.float32 & names.hf_shapes.keys()} == set(kept)
    assert len(names.float32 & names.megatron_shapes.keys()) == len(names.float32 & names.hf_shapes.keys())
