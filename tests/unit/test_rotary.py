"""Rotary embeddings stretched to longer sequences are those of transformers: settings, logits, packed rows.

Axes: B rows, S positions, T tokens of packed rows, V vocabulary.
"""

import itertools
import json

import convert_fixtures as tiny
import pytest
import torch
from config_fixtures import good_settings, load
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dynmix import platform
from megatron_dynmix.config.check import check_settings
from megatron_dynmix.config.hugging_face import hugging_face_config, model_settings
from megatron_dynmix.config.presets import COMMON, complete_model
from megatron_dynmix.convert import logits
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.logits import compare_logits, fixed_tokens, one_rank
from megatron_dynmix.convert.origin import model_of, origin_of
from megatron_dynmix.convert.tensors import as_megatron
from megatron_dynmix.errors import InputError
from megatron_dynmix.model.layers import segment_mask
from tests import deepseek_models
from tests.unit.test_convert_config import MIXTRAL_8X7B

ORIGINAL, LONGEST = 16, 256
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": ORIGINAL}
SCALED = {
    "yarn": YARN,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn, not truncated": {**YARN, "truncate": False, "beta_fast": 4, "beta_slow": 0.5},
    "yarn, truncate null": {**YARN, "truncate": None},
    "yarn, of its own strength": {**YARN, "attention_factor": 1.7, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, two scales": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, one scale": {**YARN, "mscale": 0.7},
    "yarn, the other scale": {**YARN, "mscale_all_dim": 0.7},
    "yarn, a factor that follows": {**YARN, "factor": None},
    "yarn, lengths that follow": {"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "beta_slow": 0},
    "yarn, a factor of 1": {**YARN, "factor": 1.0},
}
LATENT = [name for name in SCALED if name not in ("linear", "yarn, not truncated", "yarn, truncate null")]
CASES = [(family, name) for family in tiny.FAMILIES for name in SCALED] + [
    (family, name) for family in ("V3, yarn, no groups", "V2-Lite") for name in LATENT
]
QUICK = [("mixtral", "yarn"), ("qwen3_moe", "linear"), ("qwen3_moe", "yarn, not truncated")]


@pytest.fixture(autouse=True)
def long_rows(monkeypatch):
    platform.start()
    monkeypatch.setattr(logits, "POSITIONS", LONGEST)


def folder_of(family, rope, tmp_path):
    """A folder with long rows; latent attention reads the factor even where it may be null."""
    models = deepseek_models if family in deepseek_models.MODELS else tiny
    model = models.tiny_model(family, max_position_embeddings=LONGEST, rope_parameters=rope)
    model.save_pretrained(tmp_path / "model")
    return HuggingFaceFolder(tmp_path / "model")


def compared(folder, **changes):
    model = model_of(complete_model({"preset": None, **folder.settings, **changes}))
    return compare_logits(folder.path, folder, as_megatron(folder, folder.weight_map()), model)


def slow_unless_quick(family, name):
    return pytest.param(family, name, marks=[] if (family, name) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("family", "name"), itertools.starmap(slow_unless_quick, CASES))
def test_logits_are_those_of_transformers_far_beyond_the_original_length(family, name, tmp_path):
    folder = folder_of(family, SCALED[name], tmp_path)
    verdict = compared(folder)
    assert verdict.passed and verdict.tokens == 4 * LONGEST, verdict.describe()
    assert verdict.max_difference < 0.2 * verdict.tolerance, verdict.describe()
    again = model_settings(hugging_face_config({**COMMON, **folder.settings}))
    assert again.keys() == folder.settings.keys()
    for key, value in folder.settings.items():
        assert again[key] == (pytest.approx(value, rel=1e-12) if type(value) is float else value), key
    if "factor of 1" not in name:  # the comparison sees how far the embedding is stretched
        key = "rotary_seq_len_interpolation_factor" if name == "linear" else "rotary_scaling_factor"
        assert not compared(folder, **{key: 2.0}).passed


OVER = {"original_max_position_embeddings": 32}
"""Beside `rope_scaling`, it is what transformers takes."""
SPELLED = {
    "a length outside": {"rope_scaling": {"type": "yarn", "factor": 4.0}, **OVER},
    "two lengths": {"rope_scaling": {**YARN, "factor": 4.0}, **OVER},
    "two bases": {"rope_scaling": {**YARN, "rope_theta": 99.0}, "rope_theta": 5.0},
    "two types": {"rope_parameters": {**YARN, "type": "linear"}, "rope_theta": 5.0},
    "words of another type": {"rope_scaling": {**YARN, "type": "linear", "rope_type": "linear"}},
    "no type": {"rope_scaling": {"factor": 4.0}, "rope_theta": 5.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SPELLED)
def test_words_that_disagree_mean_what_they_mean_to_transformers(how, tmp_path):
    folder = folder_of("qwen3_moe", YARN, tmp_path)
    plain = {key: value for key, value in folder.config.items() if key != "rope_parameters"}
    (folder.path / "config.json").write_text(json.dumps({**plain, **SPELLED[how]}))
    verdict = compared(HuggingFaceFolder(folder.path))
    assert verdict.passed, verdict.describe()


@pytest.mark.parametrize("name", ["yarn", "linear"])
def test_what_is_written_is_the_same_model_to_transformers(name, tmp_path):
    folder = folder_of("mixtral", SCALED[name], tmp_path)
    written = hugging_face_config({**COMMON, **folder.settings})
    (folder.path / "config.json").write_text(json.dumps(written))
    again = HuggingFaceFolder(folder.path)
    assert again.settings == folder.settings
    assert compared(again).passed


@pytest.mark.parametrize("name", ["yarn", "linear"])
def test_segments_of_a_packed_row_are_examples_of_their_own(name, tmp_path):
    """With a mask, and joined to one sequence as Transformer Engine has them; YaRN's scale is in both."""
    folder = folder_of("mixtral", SCALED[name], tmp_path)
    checkpoint = as_megatron(folder, folder.weight_map())
    model = model_of(complete_model({"preset": None, **folder.settings}))
    row_S, bounds = fixed_tokens(131, 96)[1], (0, 40, 90, 96)
    here_S = torch.arange(96)
    segment_S = torch.bucketize(here_S, torch.tensor(bounds[1:]), right=True)
    with one_rank(), torch.no_grad():
        gpt = logits._build_cut(model, checkpoint, range(2))
        assert gpt.position_embedding_type == ("yarn" if name == "yarn" else "rope")
        alone = [
            gpt(row_S[None, first:end], here_S[None, : end - first], None)[0]
            for first, end in itertools.pairwise(bounds)
        ]
        masked_BSV = gpt(row_S[None], here_S[None], segment_mask(segment_S[None], here_S, here_S))
        borders = torch.tensor(bounds, dtype=torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=50, max_seqlen_kv=50
        )
        joined_BTV = gpt(row_S[None], here_S[None], None, packed_seq_params=packed)
    for found in (masked_BSV, joined_BTV):
        torch.testing.assert_close(found[0], torch.cat(alone), atol=2e-5, rtol=0)


STRETCHED = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 32768,
    "max_position_embeddings": 131072,
}
INTERPOLATED = {"rotary_seq_len_interpolation_factor": 2.0}
UNROUNDED = {"yarn_correction_range_round_to_int": False}
LATENT_ONE = {"multi_latent_attention": True, "rope_type": "yarn"}
REFUSED = {
    "no factor": ({"rope_type": "yarn"}, "rotary_scaling_factor, original_max_position_embeddings not given"),
    "a factor without yarn": ({"rotary_scaling_factor": 4.0}, "only YaRN has that; set rope_type to yarn"),
    "a ramp without yarn": (UNROUNDED, "only YaRN has that"),
    "two scalings": ({**STRETCHED, **INTERPOLATED}, "is that of YaRN, which has a scale of its own"),
    "scaling of latent attention": ({**LATENT_ONE, **INTERPOLATED}, "is that of latent attention"),
    "a ramp of latent attention": ({**LATENT_ONE, **UNROUNDED}, "but true in latent attention"),
    "a fused kernel": ({**STRETCHED, "apply_rope_fusion": True}, "leave out YaRN's scale of attention"),
    "interleaved": ({**STRETCHED, "rotary_interleaved": True}, "set it to false"),
    "another type": ({"rope_type": "linear"}, "rope_type is 'linear'; it must be rope or yarn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_would_be_left_out_are_refused(name, tmp_path):
    given, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        check_settings(load(tmp_path, {**good_settings(tmp_path), "model": given}), 2)


@pytest.mark.parametrize("spelled", ["rope_theta", "rope_parameters"])
def test_a_run_that_stretched_its_model_says_so_once_in_its_export(spelled, tmp_path):
    config = {**MIXTRAL_8X7B}
    if spelled == "rope_parameters":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def exported(**changes):
        settings = {**complete_model({"preset": None, **model_settings(config)}), **changes}
        return origin_of({"model": model_of(settings).flat()}, tmp_path / "iter_0000001", tmp_path).config

    assert exported() == config, "as it was given"
    for changes in (STRETCHED, {"rotary_base": 5e5}, INTERPOLATED):
        written = exported(**changes)
        means = {**model_settings(config), **changes}
        read = model_settings(written)
        assert {key: read.get(key) for key in means} == means
        assert "rope_parameters" not in written
    with pytest.raises(InputError, match="no family"):
        exported(moe_router_topk_scaling_factor=2.0)
