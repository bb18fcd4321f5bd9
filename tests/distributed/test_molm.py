"""MoLM as our model and as a plain torch reference, in any layout.

Axes: B rows, S positions, L layers, E attention experts.
"""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_dynmix.cli import main
from megatron_dynmix.config.hugging_face import model_settings
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.tensors import as_hugging_face, as_megatron
from tests.distributed import checkpoint_programs, convert_programs, programs
from tests.distributed.conftest import quick_or_slow
from tests.distributed.layouts import CP2, ETP1, PP2, TP2, ep, full
from tests.distributed.ranks import run_ranks
from tests.molm_reference import ModuleFormer, save_folder, small_config
from tests.unit.convert_fixtures import InMemory

CONFIG = small_config()
ROWS, LENGTH = 2, 16
LAYOUTS = {
    "one rank": (1, ep(1)),
    "EP2": (2, ep(2)),
    "TP2, ETP2": (2, [*TP2, *ep(1)]),
    "TP2, ETP1": (2, [*TP2, *ETP1, *ep(1)]),
    "PP2": (2, [*PP2, *ep(1)]),
    "CP2": (2, [*CP2, *ep(2)]),
    "TP2 x CP2 x EP2, recomputed": (4, [*TP2, *CP2, *ETP1, *ep(2), *full("uniform", 1)]),
    "TP2 x PP2 x EP2": (4, [*TP2, *PP2, *ETP1, *ep(2)]),
    "EP2, norms and experts recomputed": (
        2,
        [*ep(2), "--recompute-granularity", "selective", "--recompute-modules", "[moe, layernorm]"],
    ),
}


def reference():
    torch.manual_seed(3)
    return ModuleFormer(CONFIG)


def padded_vocab(flags):
    """Rows of the embedding: a multiple of 128 times the tensor-parallel size."""
    return 1280 if "--tensor-model-parallel-size" in flags else 1152


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(reference(), CONFIG, tmp_path_factory.mktemp("molm"))


@pytest.fixture(scope="module")
def rows():
    """Tokens [B, S + 1], and where segments begin: inside of a row, and otherwise in each."""
    torch.manual_seed(5)
    tokens_BS = torch.randint(CONFIG["vocab_size"], (ROWS, LENGTH + 1))
    return tokens_BS, torch.tensor([[0] * 5 + [1] * 7 + [2] * 4, [0] * 9 + [1] * 7])


@pytest.fixture(scope="module")
def expected(rows):
    """Loss, gradients by the rows of a checkpoint's embedding, loads `[L, E]` of attention experts."""
    tokens_BS, segment_BS = rows
    model, chosen = reference(), []
    for layer in model.transformer.h:
        layer.attn.q_proj.gate.register_forward_hook(lambda *call: chosen.append(call[-1].indices.flatten()))
    logits_BSV = model(tokens_BS[:, :-1], segment_BS)
    loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    learned = InMemory({name: parameter.grad for name, parameter in model.named_parameters()})
    settings = model_settings(CONFIG)
    maps = {padded: weight_map(settings, CONFIG, padded_vocab=padded) for padded in (1152, 1280)}
    load_LE = torch.stack([torch.bincount(expert, minlength=CONFIG["n_att_experts"]) for expert in chosen])
    gradients = {padded: as_megatron(learned, names) for padded, names in maps.items()}
    return loss.item(), gradients, load_LE.numpy()


@pytest.mark.parametrize("layout", quick_or_slow(LAYOUTS, {"EP2"}))
def test_loss_and_gradients_from_the_folder_are_those_of_the_reference(
    layout, folder, rows, expected, tmp_path
):
    ranks, flags = LAYOUTS[layout]
    settings = {
        "model": {"moe_router_load_balancing_type": "none"},
        "parallel": {"use_distributed_optimizer": False},
        "data": {"seq_length": LENGTH},
        "mixing": {"load_routers": "attention"},
        "training": {"micro_batch_size": 1, "global_batch_size": ROWS, "train_iters": 1},
    }
    (tmp_path / "RUN.yaml").write_text(yaml.safe_dump(settings))
    program = convert_programs.logits_and_gradients
    answers = run_ranks(ranks, program, tmp_path / "RUN.yaml", {"": folder}, flags, *rows)
    loss, gradients, load_LE = expected
    seen, wanted = [answer[""] for answer in answers], gradients[padded_vocab(flags)]
    for rank in seen:
        assert rank["loss"] == pytest.approx(loss, abs=1e-5)
        np.testing.assert_array_equal(rank["counts_HDLE"].sum(axis=(0, 1)), load_LE)
        for key, offset, gradient in rank["gradients"]:
            its = wanted.read(key, offset, gradient.shape).numpy()
            np.testing.assert_allclose(gradient, its, atol=1e-6 + 1e-5 * np.abs(its).max(), err_msg=key)
    assert {key for rank in seen for key, _, _ in rank["gradients"]} == wanted.shapes.keys()


PAPER = [
    *("--strategy", "gate-load"),
    *("--seq-length", "128", "--num-workers", "0", "--weight-decay", "0", "--micro-batch-size", "2"),
    *("--global-batch-size", "8", "--train-iters", "2", "--probe-tokens", "256", "--interval", "1"),
    *("--log-interval", "1", "--lr", "1e-2", "--lr-warmup-iters", "0", "--smoothing", "0.8"),
    *("--moe-router-load-balancing-type", "none"),
]


@pytest.mark.parametrize("layout", quick_or_slow(["EP2", "TP2, ETP1"], set()))
def test_frozen_routers_stay_bit_equal_while_the_rest_learns(layout, folder, run_yaml, tmp_path):
    ranks, flags = LAYOUTS[layout]
    settings = yaml.safe_load(run_yaml.read_text())
    settings["model"] = {"load_hf": str(folder), "freeze_router": True}
    frozen_yaml = run_yaml.with_name("frozen-molm.yaml")  # paths in it are those of its folder
    frozen_yaml.write_text(yaml.safe_dump(settings))
    updates = run_ranks(
        ranks, programs.train, frozen_yaml, [*PAPER, *flags, "--load-routers", "attention"], tmp_path
    )[0]["mixing"]
    assert np.shape(updates[-1]["load"])[-1] == CONFIG["n_att_experts"]
    before = load_file(folder / "model.safetensors")
    names = weight_map(model_settings(CONFIG), CONFIG, padded_vocab=padded_vocab(flags))
    trained = as_hugging_face(MegatronCheckpoint(tmp_path / "checkpoints/iter_0000002"), names)
    after = {name: trained.read(name, (0,) * len(shape), shape) for name, shape in trained.shapes.items()}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in after if ".gate." not in name}, "routers of both kinds, and no other"


@pytest.mark.slow
def test_a_checkpoint_is_the_same_in_another_layout_bit_for_bit(folder, run_yaml, tmp_path):
    """Trained on EP2, loaded and saved by tensor-parallel ranks and by pipeline stages."""
    settings = yaml.safe_load(run_yaml.read_text())
    settings["model"] = {"preset": str(folder)}
    molm_yaml = run_yaml.with_name("resharded-molm.yaml")  # paths in it are those of its folder
    molm_yaml.write_text(yaml.safe_dump(settings))
    run_ranks(2, programs.train, molm_yaml, [*PAPER, *ep(2)], tmp_path / "EP2")
    trained = MegatronCheckpoint(tmp_path / "EP2/checkpoints/iter_0000002")
    for name in ("TP2, ETP1", "PP2"):
        ranks, flags = LAYOUTS[name]
        flags = [*PAPER, *flags, "--pretrained-checkpoint", str(tmp_path / "EP2/checkpoints")]
        flags += ["--make-vocab-size-divisible-by", "64"] if "TP2" in name else []  # as many rows in all
        run_ranks(ranks, checkpoint_programs.save_initial_weights, molm_yaml, flags, tmp_path / name)
        saved = MegatronCheckpoint(tmp_path / name / "checkpoints/iter_0000000")
        assert saved.shapes == trained.shapes
        for key, shape in saved.shapes.items():
            whole = key, (0,) * len(shape), shape
            assert torch.equal(saved.read(*whole), trained.read(*whole)), (name, key)


def weights_in(folder):
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def test_there_with_twenty_iterations_of_mixing_and_back(folder, run_yaml, tmp_path, capsys):
    """A folder in the published format, converted, trained, exported and converted again.

    What the run exports by itself (`save_hf`) is the same, bit for bit.
    """
    start, run_dir, out, again = (tmp_path / name for name in ("start", "run", "out", "again"))
    assert main(["convert", "hf-to-megatron", str(folder), str(start)]) == 0
    settings = yaml.safe_load(run_yaml.read_text())
    settings["model"] = {"preset": str(start)}
    settings["checkpoint"] = {"pretrained_checkpoint": str(start)}
    molm_yaml = run_yaml.with_name("molm.yaml")  # paths in it are those of its folder
    molm_yaml.write_text(yaml.safe_dump(settings))
    flags = [*PAPER, *ep(2), "--train-iters", "20", "--interval", "5", "--seq-length", "64"]
    flags += ["--micro-batch-size", "1", "--global-batch-size", "4", "--smoothing", "0.05"]
    flags += ["--save-hf", "end"]
    updates = run_ranks(2, programs.train, molm_yaml, flags, run_dir)[0]["mixing"]
    assert len(updates) == 4 and len({tuple(update["new_weights"]) for update in updates}) == 4
    assert main(["convert", "megatron-to-hf", str(run_dir), str(out)]) == 0
    assert main(["convert", "hf-to-megatron", str(out), str(again)]) == 0
    assert "no model of type moduleformer" in capsys.readouterr().out
    before, after, itself = (
        weights_in(path) for path in (folder, out, run_dir / "hugging_face/iter_0000020")
    )
    learned = {name for name in before if not name.endswith(("attn.mask", "attn.cum_weight"))}
    assert itself.keys() == after.keys() and all(torch.equal(itself[name], after[name]) for name in after)
    assert after.keys() == learned and all(not torch.equal(after[name], before[name]) for name in learned)
    trained, returned = (
        MegatronCheckpoint(path) for path in (run_dir / "checkpoints/iter_0000020", again / "iter_0000000")
    )
    for name, shape in returned.shapes.items():
        whole = name, (0,) * len(shape), shape
        assert torch.equal(trained.read(*whole), returned.read(*whole)), name
