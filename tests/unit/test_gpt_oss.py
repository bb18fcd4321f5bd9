"""gpt-oss: its layout of experts, its quantized folders, sinks and windows in rows of several segments."""

import json

import pytest
import torch
from convert_fixtures import InMemory, tiny_config, tiny_folder, tiny_model
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from megatron_dynmix.cli import main
from megatron_dynmix.config.hugging_face import hugging_face_config, model_settings
from megatron_dynmix.config.presets import COMMON, complete_model
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.interleaved import as_families, as_published
from megatron_dynmix.convert.logits import one_rank
from megatron_dynmix.convert.tensors import box
from megatron_dynmix.errors import InputError
from megatron_dynmix.families.gpt_oss import USUAL_ROPE
from megatron_dynmix.model.layers import SegmentAttention, segment_mask

GPT_OSS = {"model_type": "gpt_oss"}
PUBLISHED = {
    "e.experts.gate_up_proj": torch.arange(2 * 5 * 6).view(2, 5, 6),
    "e.experts.gate_up_proj_bias": torch.arange(2 * 6).view(2, 6),
    "e.experts.down_proj": torch.arange(2 * 3 * 5).view(2, 3, 5),
    "e.norm.weight": torch.arange(5),
}


def test_gate_comes_before_up_and_rows_before_columns():
    seen = as_families(InMemory(PUBLISHED), GPT_OSS)
    first = seen.read("e.experts.gate_up_proj", (0, 0, 0), (2, 6, 5))
    assert torch.equal(first[:, :3], PUBLISHED["e.experts.gate_up_proj"][..., ::2].mT)
    assert torch.equal(first[:, 3:], PUBLISHED["e.experts.gate_up_proj"][..., 1::2].mT)
    bias = seen.read("e.experts.gate_up_proj_bias", (0, 0), (2, 6))
    assert bias[0].tolist() == [0, 2, 4, 1, 3, 5]
    second = seen.read("e.experts.down_proj", (0, 0, 0), (2, 5, 3))
    assert torch.equal(second, PUBLISHED["e.experts.down_proj"].mT)


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_box_of_either_layout_is_that_of_the_whole(name):
    seen = as_families(InMemory(PUBLISHED), GPT_OSS)
    whole = {key: seen.read(key, (0,) * len(shape), shape) for key, shape in seen.shapes.items()}
    back = as_published(InMemory(whole), GPT_OSS)
    for tensors, wanted in ((seen, whole[name]), (back, PUBLISHED[name])):
        assert tensors.shapes[name] == tuple(wanted.shape)
        for corner in torch.cartesian_prod(*map(torch.arange, wanted.shape)).view(-1, wanted.ndim).tolist():
            for far in (1, 2, 100):
                shape = [min(far, size - start) for start, size in zip(corner, wanted.shape, strict=True)]
                part = tensors.read(name, tuple(corner), tuple(shape))
                assert torch.equal(part, wanted[box(tuple(corner), tuple(shape))])


def weights_in(folder):
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def test_a_folder_comes_back_as_it_was(tmp_path, capsys):
    source = tiny_folder("gpt_oss")
    assert main(["convert", "hf-to-megatron", str(source), str(tmp_path / "in")]) == 0
    assert main(["convert", "megatron-to-hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("equal: logits of 256 tokens through all 2 layers") == 2
    before, after = weights_in(source), weights_in(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], values) for name, values in before.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())


def test_mxfp4_experts_are_read_as_those_that_they_stand_for(tmp_path):
    folder = tmp_path / "mxfp4"
    tiny_model("gpt_oss", hidden_size=64, intermediate_size=32).bfloat16().save_pretrained(folder)
    plain, tensors = {}, {}
    for name, values in weights_in(folder).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = values
            continue
        experts, columns, rows = values.shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 125, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    said = {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    published = as_published(HuggingFaceFolder(folder), GPT_OSS)
    for name, values in plain.items():
        assert torch.equal(published.read(name, (0, 0, 0), tuple(values.shape)), values), name


def test_settings_go_back_to_a_config_that_says_the_same():
    config = json.loads(tiny_config("gpt_oss").to_json_string(use_diff=False))
    settings = model_settings(config)
    assert settings["window_size"] == [4, 0] and settings["window_attn_skip_freq"] == [1, 0]
    written = hugging_face_config({**COMMON, **settings})
    assert written["model_type"] == "gpt_oss" and model_settings(written) == settings
    plain = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    without = model_settings({**plain, "layer_types": ["full_attention"] * 2})
    assert without["window_size"] is None and "rope_type" not in without
    assert model_settings(hugging_face_config({**COMMON, **without})) == without
    unsaid = {name: value for name, value in config.items() if name != "rope_parameters"}
    assert model_settings(unsaid)["rotary_scaling_factor"] == USUAL_ROPE["factor"]


@pytest.mark.parametrize("preset", ["gpt-oss-20b", "gpt-oss-120b"])
def test_a_preset_is_written_as_its_family(preset):
    written = hugging_face_config(complete_model({"preset": preset}))
    assert (written["model_type"], written["sliding_window"]) == ("gpt_oss", 128)
    assert written["layer_types"][:3] == ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": None}, "sliding_window is None"),
        ({"layer_types": ["full_attention"]}, "for each of 2 layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "it must say sliding_attention or full_attention"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0"),
        ({"attention_bias": False}, "attention_bias is False"),
    ],
)
def test_what_is_not_computed_the_same_is_refused(changes, message):
    config = json.loads(tiny_config("gpt_oss").to_json_string(use_diff=False))
    with pytest.raises(InputError, match=message):
        model_settings({**config, **changes})


LENGTHS, WINDOW, HEADS, GROUPS, WIDTH = (7, 1, 12, 4), 3, 6, 3, 10


@pytest.mark.parametrize("given", ["mask", "joined", "neither"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_each_segment_is_attended_to_as_transformers_does_alone(window, given):
    """Values and gradients, of sinks too; with neither a mask nor borders all is one segment."""
    torch.manual_seed(3)
    lengths = (sum(LENGTHS),) if given == "neither" else LENGTHS
    total = sum(lengths)
    query, key, value = (
        torch.randn(total, count, WIDTH, requires_grad=True) for count in (HEADS, GROUPS, GROUPS)
    )
    with one_rank():
        assert parallel_state.model_parallel_is_initialized()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HEADS * WIDTH,
            num_attention_heads=HEADS,
            num_query_groups=GROUPS,
            softmax_type="learnable",
            attention_dropout=0.0,
            window_size=None if window is None else (window - 1, 0),
        )
        attention = SegmentAttention(config, 1, None, "self")
    sinks = attention.softmax_offset
    torch.nn.init.normal_(sinks)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    segment_S = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(total)
    if given == "joined":
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
        ours = attention(query, key, value, None, packed_seq_params=packed)
    else:
        mask = segment_mask(segment_S[None], position, position) if given == "mask" else None
        ours = attention(*(tensor[:, None] for tensor in (query, key, value)), mask)[:, 0]
    weights = torch.randn_like(ours)
    gradients = torch.autograd.grad((ours * weights).sum(), (query, key, value, sinks))
    parts = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        rows = torch.arange(end - start)
        before = rows[:, None] - rows
        seen = (before >= 0) & (before < (window or total))
        module = torch.nn.Module()
        module.sinks, module.num_key_value_groups, module.training = sinks, HEADS // GROUPS, False
        heads = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        hidden = torch.where(seen, 0.0, -torch.inf)
        parts.append(eager_attention_forward(module, *heads, hidden, WIDTH**-0.5)[0][0].flatten(1))
    theirs = torch.cat(parts)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad((theirs * weights).sum(), (query, key, value, sinks))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
