"""DeepSeek-V2 and V3: settings from config.json and back, the weight map, what is refused."""

import json

import pytest
import torch
from config_fixtures import good_settings, load
from convert_fixtures import InMemory
from safetensors.torch import load_file, save_file

from megatron_dynmix.cli import main
from megatron_dynmix.config.check import check_settings
from megatron_dynmix.config.hugging_face import hugging_face_config, model_settings
from megatron_dynmix.config.load import load_config, to_yaml
from megatron_dynmix.config.presets import COMMON, complete_model
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.logits import compare_logits
from megatron_dynmix.convert.origin import model_of
from megatron_dynmix.convert.tensors import Cast, as_hugging_face, as_megatron
from megatron_dynmix.convert.verdict import compare_values
from megatron_dynmix.errors import InputError
from tests.deepseek_models import DEEPSEEK_V2_LITE, DEEPSEEK_V3, MODELS, YARN, tiny_model


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_read_and_back_is_bit_equal(name, fused, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path, save_original_format=not fused)
    folder = HuggingFaceFolder(tmp_path)
    names = folder.weight_map(256)
    assert names.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    megatron = as_megatron(folder, names)
    read = {key: megatron.read(key, (0,) * len(shape), shape) for key, shape in megatron.shapes.items()}
    back = as_hugging_face(InMemory(read), names)
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


def test_yarn_may_say_what_it_does_anyway_and_leave_out_what_is_usual():
    def settings(**changes):
        return model_settings({**DEEPSEEK_V2_LITE, "rope_scaling": {**YARN, **changes}})

    harmless = {"truncate": True, "partial_rotary_factor": 1.0, "attention_factor": None, "beta_fast": None}
    assert settings(**harmless) == settings()
    neither = settings(mscale=None, mscale_all_dim=None)
    assert neither == settings(mscale=1.0, mscale_all_dim=0.0)


LEFT_OUT = {"model.layers.3.eh_proj.weight": (30, 60), "model.layers.3.mlp.gate.weight": (8, 30)}
"""Of a layer for multi-token prediction, after three layers."""


@pytest.fixture(name="predicting")
def predicting_fixture(tmp_path):
    """A folder with such a layer beside its model, as the published V3."""
    folder = tmp_path / "predicting"
    tiny_model("V3", num_nextn_predict_layers=1).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.full(shape, 0.3) for name, shape in LEFT_OUT.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_layers_for_multi_token_prediction_are_kept_aside_and_come_back(dtype, predicting, tmp_path, capsys):
    """Rounded weights are given to the reference, corrections of the router's scores among them."""
    way_in = ["convert", "hf-to-megatron", str(predicting), str(tmp_path / "in"), "--dtype", dtype]
    assert main(way_in) == 0
    said = capsys.readouterr().out
    assert "kept aside: 2 tensors (model.layers.3.*)" in said
    assert "equal: logits of 256 tokens through all 3 layers" in said
    assert ("both with the rounded weights" in said) == (dtype == "bf16")
    way_out = ["convert", "megatron-to-hf", str(tmp_path / "in"), str(tmp_path / "out"), "--no-verify"]
    assert main(way_out) == 0
    assert "written as they came: 2 tensors (model.layers.3.*)" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    exported = weights_in(tmp_path / "out")
    assert all(torch.equal(exported[name], torch.full(shape, 0.3)) for name, shape in LEFT_OUT.items())
    assert exported.keys() == weights_in(predicting).keys()


def test_without_the_layers_that_config_counts_the_export_counts_none(predicting, tmp_path, capsys):
    assert main(["convert", "hf-to-megatron", str(predicting), str(tmp_path / "in"), "--no-verify"]) == 0
    (tmp_path / "in/aside.safetensors").unlink()
    way_out = ["convert", "megatron-to-hf", str(tmp_path / "in"), str(tmp_path / "out"), "--no-verify"]
    assert main(way_out) == 0
    assert "counts 1 layers for multi-token prediction, which are not there" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("said", [0, None, "absent"])
def test_layers_that_the_configuration_does_not_know_of_are_refused(said, predicting):
    path = predicting / "config.json"
    config = {**json.loads(path.read_text()), "num_nextn_predict_layers": said}
    if said == "absent":
        del config["num_nextn_predict_layers"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"layers\.3\.eh_proj\.weight.*num_nextn_predict_layers"):
        HuggingFaceFolder(predicting)


@pytest.mark.parametrize(
    "width", ["q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"]
)
def test_another_width_of_latent_attention_is_another_model(width, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    with pytest.raises(InputError, match=f"another shape than the settings: {width} 96"):
        load(tmp_path, {**good_settings(tmp_path), "model": {"preset": "./", width: 96}})


def test_a_rotary_embedding_that_is_unknown_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    config = load(tmp_path, {**good_settings(tmp_path), "model": {"preset": "./", "rope_type": "linear"}})
    with pytest.raises(InputError, match="rope_type is 'linear'; it must be rope or yarn"):
        check_settings(config, 2)


def test_what_a_run_resolves_is_read_back_though_a_width_is_null(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V2_LITE))
    config = load(tmp_path, {**good_settings(tmp_path), "model": {"preset": "./"}})
    assert config.model.megatron["q_lora_rank"] is None
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("V2-Lite", {"topk_method": "group_limited_greedy"}, "topk_method"),
        ("V3", {"num_experts_per_tok": 6}, "topk_group"),
        ("V3", {"scoring_func": "softmax"}, "scoring_func"),
        ("V3", {"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers is 'one'"),
        ("V3", {"kv_lora_rank": None}, "kv_lora_rank"),
        ("V3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ("V3", {"rope_parameters": {**YARN, "truncate": False}}, "says truncate False"),
        ("V3", {"rope_parameters": {"rope_type": "yarn"}}, "says no factor"),
        ("V3", {"rope_parameters": {**YARN, "factor": 1, "attention_factor": 1.2}}, "it must be 1 then"),
        ("V3", {"first_k_dense_replace": 3}, "leaves none of 3 layers with experts"),
        ("V3", {"routed_scaling_factor": "2.5"}, "routed_scaling_factor is '2.5'; it must be a number"),
        ("V3", {"quantization_config": {"quant_method": "awq"}}, "says awq.*take the model in bfloat16"),
    ],
)
def test_what_is_not_computed_the_same_is_refused(name, changes, message):
    config = json.loads(tiny_model(name).config.to_json_string(use_diff=False))
    with pytest.raises(InputError, match=message):
        model_settings({**config, **changes})


BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module", name="biased")
def biased_fixture(tmp_path_factory):
    """A folder in which rounding the correction of the router's scores sends tokens to other experts."""
    folder, model = tmp_path_factory.mktemp("biased"), tiny_model("V3")
    with torch.no_grad():
        for name, values in model.named_buffers():
            if name.endswith("correction_bias"):
                values += 100
    model.save_pretrained(folder)
    return folder


def weights_in(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("first", "second"), [("bf16", "keep"), ("keep", "fp16")])
def test_corrections_of_scores_stay_float32_in_both_directions(first, second, biased, tmp_path, capsys):
    way_in = ["convert", "hf-to-megatron", str(biased), str(tmp_path / "in"), "--dtype", first]
    assert main(way_in) == 0
    way_out = ["convert", "megatron-to-hf", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", second]
    assert main(way_out) == 0
    said = capsys.readouterr().out
    assert said.count("equal: logits of 256 tokens") == 2
    assert "every value that was read, rounded" in said
    assert f"float32 as in transformers, and not cast: {BIAS.format(1)}, {BIAS.format(2)}" in said
    before, after = weights_in(biased), weights_in(tmp_path / "out")
    narrow = torch.bfloat16 if first == "bf16" else torch.float16
    for name, values in before.items():
        kept = name.endswith("correction_bias")
        assert torch.equal(after[name], values if kept else values.to(narrow)), name
        assert after[name].dtype == (torch.float32 if kept else narrow), name


def test_a_correction_that_was_rounded_is_no_conversion(biased, tmp_path):
    """Wherever it happens: neither values nor logits are compared with a source that is rounded likewise."""
    folder = HuggingFaceFolder(biased)
    names = folder.weight_map()
    wrong = Cast(folder, torch.bfloat16)
    verdicts = compare_values(folder, wrong, names, torch.bfloat16)
    assert [group.differing for group in verdicts if group.differing] == [(BIAS.format(1), BIAS.format(2))]
    model = model_of(complete_model({"preset": None, **folder.settings}))
    for kept, passed in ((names.float32, True), ((), False)):
        checkpoint = as_megatron(Cast(folder, torch.bfloat16, kept), names)
        verdict = compare_logits(biased, folder, checkpoint, model, torch.bfloat16, names.float32)
        assert verdict.passed == passed and verdict.rounded, verdict.describe()
