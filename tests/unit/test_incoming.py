"""Folders that hold more than plain floats of one model: quantized, multimodal, an output layer twice."""

import json
import re

import pytest
import torch
from convert_fixtures import tiny_model
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_dynmix.cli import main
from megatron_dynmix.config.quantization import quantization_of
from megatron_dynmix.convert import quantized as quantized_weights
from megatron_dynmix.convert.aside import aside_text
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.quantized import Dequantized
from megatron_dynmix.convert.tensors import box
from megatron_dynmix.convert.weight_files import WeightFiles
from megatron_dynmix.errors import EXIT_REFUSED, InputError
from tests import deepseek_models

BLOCK = (4, 8)
FP8 = {"quant_method": "fp8", "weight_block_size": [*BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
BOXES = [((0, 0), (13, 21)), ((3, 7), (2, 1)), ((4, 8), (4, 8)), ((12, 0), (1, 21)), ((0, 20), (13, 1))]


def quantized(weight, scale_type=torch.float32):
    """An fp8 tensor, whose blocks have scales of their own."""
    grid = [-(-size // block) for size, block in zip(weight.shape[-2:], BLOCK, strict=True)]
    scale = (1 + torch.rand(*weight.shape[:-2], *grid)).to(scale_type)
    return weight.to(torch.float8_e4m3fn), scale


def opened(tmp_path, tensors, said):
    path = tmp_path / "some.safetensors"
    save_file(tensors, path)
    return Dequantized(WeightFiles({path: None}), quantization_of({"quantization_config": said}))


def whole_blocks(weight, scale):
    """As transformers has it, which knows whole blocks alone."""
    rows, columns = (size * block for size, block in zip(scale.shape, BLOCK, strict=True))
    full = torch.zeros(rows, columns, dtype=weight.dtype)
    full[: weight.shape[0], : weight.shape[1]] = weight
    plain = Fp8Dequantize(None)._dequantize_one(full, scale, torch.bfloat16)
    return plain[: weight.shape[0], : weight.shape[1]]


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize(("offset", "shape"), BOXES)
def test_any_box_of_fp8_weights_is_what_transformers_makes_of_it(
    offset, shape, scale_type, tmp_path, monkeypatch
):
    monkeypatch.setattr(quantized_weights, "ROWS_AT_ONCE", 3)
    weight, scale = quantized(torch.randn(13, 21), scale_type)
    tensors = opened(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, FP8)
    assert tensors.shapes == {"a.weight": (13, 21)} and tensors.dtypes == {"a.weight": torch.bfloat16}
    part = tensors.read("a.weight", offset, shape)
    assert torch.equal(part, whole_blocks(weight, scale)[box(offset, shape)])


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((0, 0, 0), (3, 96, 5)), ((1, 31, 2), (2, 2, 3)), ((2, 64, 0), (1, 32, 1)), ((0, 5, 4), (1, 7, 1))],
)
def test_any_box_of_mxfp4_weights_is_what_transformers_makes_of_it(offset, shape, tmp_path):
    blocks = torch.randint(256, (3, 5, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 5, 3), dtype=torch.uint8)
    tensors = opened(tmp_path, {"w_blocks": blocks, "w_scales": scales}, MXFP4)
    assert tensors.shapes == {"w": (3, 96, 5)}
    part = tensors.read("w", offset, shape)
    assert torch.equal(part, convert_moe_packed_tensors(blocks, scales)[box(offset, shape)])


SCALED = {"a.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 1)}


@pytest.mark.parametrize(
    ("tensors", "said", "message"),
    [
        ({"a.weight": SCALED["a.weight"]}, FP8, "a.weight_scale_inv is not there"),
        ({**SCALED, "a.weight": torch.zeros(8, 8)}, FP8, "a.weight is not fp8 there"),
        ({**SCALED, "a.weight_scale_inv": torch.ones(1, 1)}, FP8, r"it must be \[2, 1\]"),
        ({**SCALED, "a.weight_scale_inv": torch.ones(2, 1).int()}, FP8, "of type I32, and a scale is one of"),
        ({"a.weight": torch.zeros(8, 8)}, FP8, "says fp8 in blocks of 4 x 8, but no tensor is"),
        ({"w_blocks": torch.zeros(2, 3, 1, 16).byte()}, MXFP4, "w_scales is not there"),
        ({"w_scales": torch.zeros(2, 3, 1).byte()}, MXFP4, "w_blocks is not there"),
        (
            {"w_blocks": torch.zeros(2, 3, 1, 8).byte(), "w_scales": torch.zeros(2, 3, 1).byte()},
            MXFP4,
            r"w_blocks is \[2, 3, 1, 8\].*mxfp4 is bytes",
        ),
    ],
)
def test_quantized_weights_that_do_not_go_together_are_refused(tensors, said, message, tmp_path):
    with pytest.raises(InputError, match=message):
        opened(tmp_path, tensors, said)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "says gptq"),
        ("int8", "says int8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "says compressed-tensors"),
        ({**FP8, "weight_block_size": None}, "weight_block_size None"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme 'static'"),
    ],
)
def test_what_is_quantized_otherwise_is_refused(said, message):
    with pytest.raises(InputError, match=message):
        quantization_of({"quantization_config": said})


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def there_and_back(source, tmp_path, *flags):
    assert main(["convert", "hf-to-megatron", str(source), str(tmp_path / "in"), *flags]) == 0
    assert main(["convert", "megatron-to-hf", str(tmp_path / "in"), str(tmp_path / "out"), *flags]) == 0
    return tmp_path / "out"


@pytest.fixture(name="fp8_folder")
def fp8_folder_fixture(tmp_path):
    """A tiny DeepSeek-V3 as it is published: fp8, with a layer for multi-token prediction."""
    folder = tmp_path / "fp8"
    deepseek_models.tiny_model("V3", num_nextn_predict_layers=1).bfloat16().save_pretrained(folder)
    tensors = weights_in(folder) | {"model.layers.3.eh_proj.weight": torch.randn(30, 60).bfloat16()}
    wanted = dict(tensors)
    torch.manual_seed(0)
    for name, values in [*tensors.items()]:
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = quantized(values)
            wanted[name] = whole_blocks(tensors[name], tensors[f"{name}_scale_inv"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, quantization_config=FP8, dtype="bfloat16")
    return folder, wanted


def test_an_fp8_folder_is_trained_in_bfloat16_and_comes_back_so(fp8_folder, tmp_path, capsys):
    folder, wanted = fp8_folder
    exported = weights_in(there_and_back(folder, tmp_path))
    said = capsys.readouterr().out
    assert said.count("equal: logits of 256 tokens through all 3 layers") == 2
    assert "note: the weights were fp8 in blocks of 4 x 8, and are bfloat16 now" in said
    assert "note: the weights came as fp8 in blocks of 4 x 8: those of the export are not quantized" in said
    assert said.count("kept aside") == 4  # counted, compared and named on the way in, compared on that out
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], values) for name, values in wanted.items())


def test_fp8_weights_of_which_config_says_nothing_are_refused(fp8_folder):
    folder, _ = fp8_folder
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is of type F8_E4M3; weights are taken as"):
        HuggingFaceFolder(folder)


def wrapped(folder, rename, beside, **top):
    """Make of a language model's folder that of a multimodal model."""
    tensors = {rename(name): values for name, values in weights_in(folder).items()} | beside
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"]}
    whole |= {"text_config": text, "vision_config": {"hidden_size": 8}, "dtype": "float32", **top}
    (folder / "config.json").write_text(json.dumps(whole))
    return whole


VISION = {
    "model.vision_tower.layers.0.weight": torch.randn(5, 3).half(),
    "model.vision_tower.position_ids": torch.arange(7),
    "model.multi_modal_projector.scale": torch.tensor(3.0),
    "model.vision_tower.none": torch.zeros(0, 4),
}
STYLES = {
    "model.language_model.": lambda name: re.sub("^model[.]", "model.language_model.", name),
    "language_model.": lambda name: f"language_model.{name}",
}


@pytest.mark.parametrize(
    "style", ["model.language_model.", pytest.param("language_model.", marks=pytest.mark.slow)]
)
def test_the_text_part_of_a_multimodal_model_is_taken_and_the_rest_comes_back(style, tmp_path, capsys):
    folder = tmp_path / "wrapper"
    tiny_model("qwen3_moe").save_pretrained(folder)
    whole = wrapped(folder, STYLES[style], VISION, tie_word_embeddings=False)
    before = weights_in(folder)
    exported = weights_in(there_and_back(folder, tmp_path))
    said = capsys.readouterr().out
    assert said.count("equal: logits of 256 tokens through all 2 layers") == 2
    assert "kept aside: 4 tensors (model.multi_modal_projector.*, model.vision_tower.*)" in said
    assert json.loads((tmp_path / "out/config.json").read_text()) == whole
    assert exported.keys() == before.keys()
    for name, values in before.items():
        assert torch.equal(exported[name], values) and exported[name].dtype == values.dtype, name


def test_a_multimodal_model_without_its_prefix_or_its_rest_is_refused(tmp_path, capsys):
    folder = tmp_path / "wrapper"
    tiny_model("qwen3_moe").save_pretrained(folder)
    wrapped(folder, STYLES["language_model."], VISION)
    assert main(["convert", "hf-to-megatron", str(folder), str(tmp_path / "in"), "--no-verify"]) == 0
    (tmp_path / "in/aside.safetensors").unlink()
    assert main(["convert", "megatron-to-hf", str(tmp_path / "in"), str(tmp_path / "out")]) == EXIT_REFUSED
    assert "all but its language model is not there" in capsys.readouterr().err
    save_file({"visual.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="no tensor begins with model"):
        HuggingFaceFolder(folder)


@pytest.mark.parametrize("same", [True, False])
def test_an_output_layer_beside_a_tied_embedding_must_be_the_same(same, tmp_path, capsys):
    folder = tmp_path / "tied"
    tiny_model("mixtral", tie_word_embeddings=True).save_pretrained(folder)
    tensors = weights_in(folder)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0 if same else 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    if same:
        assert weights_in(there_and_back(folder, tmp_path, "--no-verify")).keys() == tensors.keys()
        assert re.search(r"computed, left out +1", capsys.readouterr().out)
    else:
        with pytest.raises(InputError, match=r"which is not model\.embed_tokens"):
            HuggingFaceFolder(folder)


def test_what_is_kept_aside_is_named_by_its_parts():
    names = ["model.layers.61.a.weight", "model.layers.61.b", "visual.blocks.0.w", "model.visual.x.y"]
    assert "4 tensors (model.layers.61.*, model.visual.*, visual.*)" in aside_text(names)
