"""A Hugging Face folder that a run cannot start from is refused by names and shapes, before ranks start."""

import json
import shutil
from types import SimpleNamespace

import pytest
from config_fixtures import good_settings, load, write
from convert_fixtures import tiny_folder

from megatron_dynmix import platform
from megatron_dynmix.cli import main
from megatron_dynmix.errors import InputError
from megatron_dynmix.job import launch

platform.start()
from megatron_dynmix.convert.export_hf import check_export  # noqa: E402
from megatron_dynmix.convert.import_hf import check_load_hf, folder_for, weights_of  # noqa: E402
from megatron_dynmix.training import setup  # noqa: E402


@pytest.fixture(name="folder")
def folder_fixture(tmp_path):
    return shutil.copytree(tiny_folder("mixtral"), tmp_path / "hf")


def test_a_folder_is_seen_as_a_checkpoint_of_the_padded_model(tmp_path, folder):
    config = load(tmp_path, {"model": {"load_hf": "hf"}}, ["--make-vocab-size-divisible-by", "100"])
    check_load_hf(config)
    weights = weights_of(folder_for(folder, config), config)
    assert weights.shapes["embedding.word_embeddings.weight"] == (200, 30)
    assert not weights.read("output_layer.weight", (131, 0), (69, 30)).any()


def test_a_folder_whose_weights_are_not_those_of_its_configuration_is_refused(tmp_path, folder):
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "intermediate_size": 16}))
    config = load(tmp_path, {"model": {"load_hf": "hf"}})
    with pytest.raises(InputError, match=r"block_sparse_moe.* is \[.*14.*\] in .* but .*config.json says"):
        check_load_hf(config)


def test_a_run_resolved_for_another_model_than_the_folder_now_holds_is_refused(tmp_path, folder):
    config = load(tmp_path, {"model": {"load_hf": "hf"}})
    shutil.rmtree(folder)
    shutil.copytree(tiny_folder("mixtral", num_local_experts=4), folder)
    with pytest.raises(InputError, match=r"hf holds another model: num_moe_experts 4 \(now 6\); give"):
        check_load_hf(config)


def test_a_run_starts_from_the_weights_of_one_only(tmp_path, folder):
    config = load(tmp_path, {"model": {"load_hf": "hf"}, "checkpoint": {"pretrained_checkpoint": "other"}})
    with pytest.raises(InputError, match=r"load_hf .* and checkpoint.pretrained_checkpoint .* are both"):
        check_load_hf(config)


def test_a_model_of_no_family_cannot_be_saved_for_transformers(tmp_path):
    flags = ["--preset", "tiny", "--save-hf", "end"]
    check_export(load(tmp_path, {}, flags), tmp_path / "run")
    bad = [*flags, "--moe-router-score-function", "sigmoid"]
    with pytest.raises(InputError, match="moe_router_score_function 'sigmoid'"):
        check_export(load(tmp_path, {}, bad), tmp_path / "run")


@pytest.mark.parametrize("flags", [[], ["--nproc-per-node", "2"]], ids=str)
def test_a_bad_folder_ends_the_command_before_any_rank(tmp_path, folder, flags, monkeypatch, capsys):
    settings = {**good_settings(tmp_path), "model": {"load_hf": "hf", "max_position_embeddings": 64}}
    settings["parallel"] = {}
    shard = min(folder.glob("*.safetensors"))
    shard.unlink()
    monkeypatch.setattr(setup, "load_tokenizer", lambda *args, **options: SimpleNamespace(vocab_size=131))
    monkeypatch.setattr(launch, "launch_ranks", lambda *args: pytest.fail("ranks were started"))
    run_yaml = write(tmp_path, settings)
    assert main(["train", str(run_yaml), "--run-dir", str(tmp_path / "run"), *flags]) == 2
    assert f"hf is missing {shard.name} of the" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
