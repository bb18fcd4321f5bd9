"""DeepSeek-V2 and V3 from a folder are the models of transformers: logits, gradients, in any layout.

Axes: B rows, S positions, V vocabulary.
"""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_dynmix.config.presets import read_shape
from megatron_dynmix.convert.hf_folder import HuggingFaceFolder
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.tensors import as_megatron
from tests.deepseek_models import COMMON, MODELS, tiny_model
from tests.distributed import programs
from tests.distributed.conftest import SMALL
from tests.distributed.layouts import PP2, TP2, ep, full
from tests.distributed.oracle import check_folders
from tests.distributed.ranks import run_ranks
from tests.unit.convert_fixtures import InMemory

VOCAB = COMMON["vocab_size"]
CORRECTION = "e_score_correction_bias"
LAYOUTS = {
    "EP2": (2, ep(2)),
    "TP2": (2, TP2),
    "PP2": (2, [*PP2, "--num-layers-in-first-pipeline-stage", "1"]),
}


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(name) for name in MODELS}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("deepseek") for name in MODELS}
    for name, folder in folders.items():
        models[name].save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def rows_BS():
    torch.manual_seed(5)
    return torch.randint(VOCAB, (2, 25))  # past where YaRN's original positions end


@pytest.fixture(scope="module")
def expected(models, folders, rows_BS):
    """Name -> logits [B, S, V], and gradients under the names of a checkpoint."""
    found = {}
    for name, model in models.items():
        logits_BSV = model.eval()(rows_BS[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), rows_BS[:, 1:].flatten()).backward()
        gradients = {
            key: torch.zeros_like(values) if values.grad is None else values.grad
            for key, values in [*model.named_parameters(), *model.named_buffers()]
            if CORRECTION in key or isinstance(values, torch.nn.Parameter)
        }
        settings, config = read_shape(folders[name]), model.config.to_dict()
        names = weight_map(settings, config, fused_experts=True, padded_vocab=256)
        found[name] = logits_BSV.detach().numpy(), as_megatron(InMemory(gradients), names)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_those_of_transformers(layout, folders, expected, rows_BS, tmp_path):
    check_folders(LAYOUTS[layout], folders, expected, rows_BS, tmp_path)


def test_a_run_from_the_folder_leaves_a_checkpoint_of_the_same_tensors(folders, run_yaml, tmp_path):
    settings = yaml.safe_load(run_yaml.read_text())
    wide = tiny_model("V3", vocab_size=1031)  # room for the tokenizer of the sources
    wide.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.layers.3.enorm.weight"] = torch.ones(30)  # of a layer for multi-token prediction
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    settings["model"] = {"load_hf": str(tmp_path / "model")}
    settings["parallel"] = {"expert_model_parallel_size": 2}
    own_yaml = run_yaml.with_name("deepseek.yaml")  # paths in it are those of its folder
    own_yaml.write_text(yaml.safe_dump(settings))
    flags = [*SMALL[SMALL.index("--seq-length") :], "--seq-length", "64", *full("uniform", 1)]
    flags += ["--bf16", "--save-hf", "end"]
    result = run_ranks(2, programs.train, own_yaml, flags, tmp_path / "run")[0]
    assert len(result["mixing"]) == 2
    assert all(np.isfinite(record["lm_loss"]) for record in result["metrics"])
    names = HuggingFaceFolder(tmp_path / "model").weight_map(1152)
    checkpoint = MegatronCheckpoint(tmp_path / "run/checkpoints/iter_0000004")
    assert {key: tuple(shape) for key, shape in checkpoint.shapes.items()} == dict(names.megatron_shapes)
    exported = load_file(tmp_path / "run/hugging_face/iter_0000004/model.safetensors")
    assert torch.equal(exported.pop("model.layers.3.enorm.weight"), torch.ones(30)), "as it came"
    for key, values in exported.items():
        kept = key.endswith(CORRECTION)
        assert values.dtype == (torch.float32 if kept else torch.bfloat16), key
        assert not kept or not torch.equal(values, values.bfloat16().float()), (
            "numbers that bf16 has no room for"
        )
