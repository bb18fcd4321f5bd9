"""Our model from a Hugging Face folder is the model of transformers: logits, loss, gradients, any layout.

Axes: B rows, S positions, V vocabulary.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
import yaml

from megatron_dynmix.cli import main
from megatron_dynmix.config.presets import read_shape
from megatron_dynmix.convert.conversion import hf_to_megatron
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.tensors import as_megatron
from tests.distributed import convert_programs
from tests.distributed.layouts import ETP1, PP2, TP2, ep
from tests.distributed.ranks import run_ranks
from tests.unit.convert_fixtures import InMemory, tiny_folder

EVEN = {"num_key_value_heads": 2}
"""Megatron-Core wants a KV group, or several, for each tensor-parallel rank."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
"""Rows are longer than what it begins with."""
MODELS = {
    "mixtral": ("mixtral", {}),
    "mixtral, tied": ("mixtral", {"tie_word_embeddings": True, **EVEN}),
    "qwen2": ("qwen2_moe", {"norm_topk_prob": True, **EVEN}),
    "qwen2, a dense layer": ("qwen2_moe", {"mlp_only_layers": [0], **EVEN}),
    "qwen3": ("qwen3_moe", {**EVEN}),
    "qwen3, not normed": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3, converted": ("qwen3_moe", {**EVEN}),
    "olmoe": ("olmoe", {}),
    "olmoe, normed": ("olmoe", {"norm_topk_prob": True}),
    "mixtral, yarn": ("mixtral", {"rope_parameters": YARN, **EVEN}),
    "qwen3, linear": ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}, **EVEN}),
}
"""Name -> family, changes of its configuration."""
FUSED = {"mixtral, tied", "qwen3", "qwen3, converted", "olmoe, normed"}
FULL_WIDTH = {"olmoe", "olmoe, normed"}
ROWS, LENGTH = 2, 16
MANY_FILES = {"TP2 x EP2, ETP2": (4, [*TP2, *ep(2)]), "TP2 x EP2, ETP1": (2, [*TP2, *ETP1, *ep(2)])}
"""Layouts in which every tensor is cut."""
LAYOUTS = {
    "one rank": (1, []),
    "EP2": (2, ep(2)),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
}


@pytest.fixture(scope="module")
def folders():
    return {
        name: tiny_folder(family, fused=name in FUSED, **changes)
        for name, (family, changes) in MODELS.items()
    }


@pytest.fixture(scope="module")
def starts(folders, tmp_path_factory):
    """Name -> the folder that a run starts from."""
    converted = tmp_path_factory.mktemp("converted") / "qwen3"
    hf_to_megatron(
        folders["qwen3, converted"], converted, dtype=None, vocab_multiple=128, verify=False, say=print
    )
    return {**folders, "qwen3, converted": converted}


@pytest.fixture(scope="module")
def tokens_BS():
    torch.manual_seed(3)
    tokens_BS = torch.randint(131, (ROWS, LENGTH + 1))
    tokens_BS[:, :2] = torch.tensor([0, 130])  # the ends of the vocabulary
    return tokens_BS


@pytest.fixture(scope="module")
def expected(folders, tokens_BS):
    """Of transformers: logits [B, S, V], loss, gradients under the names of a checkpoint."""
    return {name: _expected(folder, tokens_BS) for name, folder in folders.items()}


def _expected(folder, tokens_BS):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    model.config.output_router_logits = False
    logits_BSV = model(tokens_BS[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    names = weight_map(read_shape(folder), model.config.to_dict(), fused_experts=True, padded_vocab=256)
    return logits_BSV.detach().numpy(), loss.item(), as_megatron(InMemory(gradients), names)


@pytest.fixture(scope="module")
def layout_yaml(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "RUN.yaml"
    settings = {
        "model": {"moe_aux_loss_coeff": 0.0},
        "parallel": {"use_distributed_optimizer": False},
        "data": {"seq_length": LENGTH},
        "training": {"micro_batch_size": 1, "global_batch_size": ROWS, "train_iters": 1},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_gradients_are_those_of_transformers(
    layout, layout_yaml, starts, expected, tokens_BS
):
    ranks, flags = LAYOUTS[layout]
    chosen = dict(starts)
    if layout == "TP2":
        # all real tokens are rank 0's: what rank 1 has pads the vocabulary
        flags = [*flags, "--make-vocab-size-divisible-by", "256"]
        chosen = {
            name: folder
            for name, folder in starts.items()
            if "num_key_value_heads" in MODELS[name][1] and name not in FULL_WIDTH
        }
    answers = run_ranks(ranks, convert_programs.logits_and_gradients, layout_yaml, chosen, flags, tokens_BS)
    for name in chosen:
        logits_BSV, loss, gradients = expected[name]
        assert logits_BSV.std() > 0.1, "logits that say something"
        seen = [answer[name] for answer in answers]
        np.testing.assert_allclose(_whole(seen, layout), logits_BSV, atol=1e-4, rtol=0, err_msg=name)
        for rank in seen:
            assert rank["loss"] == pytest.approx(loss, abs=1e-5), name
            for key, offset, gradient in rank["gradients"]:
                wanted = gradients.read(key, offset, gradient.shape).numpy()
                np.testing.assert_allclose(gradient, wanted, atol=1e-4, rtol=0, err_msg=f"{name}: {key}")
        keys = {key for rank in seen for key, _, _ in rank["gradients"]}
        assert keys == gradients.shapes.keys(), name


TOKENS = 1031


@pytest.fixture
def source(tmp_path, request):
    """A model that has a row for each token of the quickstart's tokenizer, and some more."""
    sizes = {"vocab_size": TOKENS, "max_position_embeddings": 128, "eos_token_id": 3}
    made = tiny_folder("mixtral", **sizes, **getattr(request, "param", {}))
    return shutil.copytree(made, tmp_path / "source")


@pytest.fixture
def train_yaml(run_yaml, source, tmp_path):
    """The quickstart's run, from that model."""
    settings = yaml.safe_load(run_yaml.read_text())
    settings["model"] = {"load_hf": "source"}
    settings["data"]["tokenizer"] = str(run_yaml.parent / settings["data"]["tokenizer"])
    for entry in settings["data"]["sources"].values():
        for key in ("path", "probe"):
            entry[key] = str(run_yaml.parent / entry[key])
    path = tmp_path / "RUN.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


SHORT = [
    *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "4", "--strategy", "uniform"),
    *("--lr-warmup-iters", "0", "--lr", "1e-2", "--log-interval", "1", "--save-interval", "1"),
]


def test_a_run_begins_with_a_folder_and_ends_with_one(train_yaml, source, tokens_BS, tmp_path):
    before, config = _logits_of(source, tokens_BS), json.loads((source / "config.json").read_text())
    program, run_dir = convert_programs.there_and_back, tmp_path / "run"
    answers = run_ranks(2, program, train_yaml, [*SHORT, *ep(2)], run_dir, source, tokens_BS)
    folders = {folder.name: folder for folder in (run_dir / "hugging_face").iterdir()}
    assert folders.keys() == {"iter_0000001", "iter_0000002", "iter_0000004"}
    for part, name in enumerate(("iter_0000002", "iter_0000004")):
        after = _logits_of(folders[name], tokens_BS)
        for answer in answers:
            found = np.stack([row for _, row in answer[part]])
            np.testing.assert_allclose(found[..., :TOKENS], after, atol=1e-4, rtol=0)
        assert np.abs(after - before).max() > 1e-2, "two iterations have changed the model"
        assert len(list(folders[name].glob("*.safetensors"))) > 2, "both ranks had some to write"
        assert (folders[name] / "tokenizer.json").is_file()
        assert json.loads((folders[name] / "config.json").read_text()) == config
        before = after
    failure = answers[0][2]
    assert "iter_0000005 could not be written: rank 1: [Errno 28] No space left on device" in failure
    assert "checkpoints/iter_0000005 is whole; `megatron-dynmix convert megatron-to-hf" in failure
    assert (run_dir / "checkpoints/iter_0000005/checksums.json").is_file()


def _logits_of(folder, tokens_BS):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    with torch.no_grad():
        return model(tokens_BS[:, :-1]).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("source", [EVEN], indirect=True)
@pytest.mark.parametrize("layout", MANY_FILES)
def test_what_several_ranks_wrote_is_converted(layout, train_yaml, source, tokens_BS, tmp_path, capsys):
    """The export answers as the run itself: both sides of the verdict read the same checkpoint."""
    ranks, flags = MANY_FILES[layout]
    flags = [*SHORT, *flags, "--train-iters", "2"]
    answers = run_ranks(ranks, convert_programs.trained, train_yaml, flags, tmp_path / "run", tokens_BS)
    folder = tmp_path / "run/checkpoints/iter_0000002"
    assert {path.name.split("_")[2] for path in folder.glob("*.distcp")} == set(map(str, range(ranks)))
    assert main(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "equal: logits of 256 tokens through all 2 layers" in capsys.readouterr().out
    after = _logits_of(tmp_path / "out", tokens_BS)
    np.testing.assert_allclose(_whole(answers[:2], "TP2", TOKENS), after, atol=1e-4, rtol=0)
    assert np.abs(after - _logits_of(source, tokens_BS)).max() > 1e-2, "training has changed the model"


def _whole(seen, layout, tokens=131):
    """Logits [B, S, V] from the ranks' parts."""
    parts = [rank["logits"] for rank in seen if rank["logits"]]
    if layout == "TP2":
        rows = [
            np.concatenate([part for _, part in sorted(both, key=lambda p: p[0])], -1)
            for both in zip(*parts, strict=True)
        ]
    else:
        rows = [row for part in parts for _, row in part]
    return np.stack(rows)[..., :tokens]
