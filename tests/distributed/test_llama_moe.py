"""LLaMA-MoE v1 as our model and as a plain torch reference. Axes: B rows, S positions, V vocabulary."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_dynmix.config.hugging_face import model_settings
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.tensors import as_hugging_face, as_megatron
from tests.distributed import programs
from tests.distributed.layouts import PP2, TP2, ep, full
from tests.distributed.oracle import check_folders
from tests.distributed.ranks import run_ranks
from tests.llama_moe_reference import LlamaMoE, save_folder, small_config
from tests.unit.convert_fixtures import InMemory

CONFIG = small_config()
QUIET = small_config(gate_add_noise=False)
SHAPE = [
    *("--preset", "llama-moe-3.5b-2-8", "--num-layers", "2", "--hidden-size", "32", "--vocab-size", "1031"),
    *(
        "--ffn-hidden-size",
        "24",
        "--num-attention-heads",
        "4",
        "--num-query-groups",
        "4",
        "--num-experts",
        "4",
    ),
    *("--moe-router-topk-scaling-factor", "2.0", "--max-position-embeddings", "2048"),
    *("--moe-aux-loss-coeff", "0", "--seq-length", "128", "--num-workers", "0", "--weight-decay", "0"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "2", "--probe-tokens", "256"),
    *("--interval", "1", "--log-interval", "1", "--lr", "1e-2", "--lr-warmup-iters", "0"),
]
EP1 = ["--expert-model-parallel-size", "1"]
SEED = 11


def reference(config=CONFIG):
    torch.manual_seed(3)
    return LlamaMoE(config)


def tokens_BS():
    return torch.arange(31)[None] * 37 % CONFIG["vocab_size"]


def as_ours(tensors):
    """Parameters of our model on one rank from those of the reference, or gradients likewise."""
    ours = {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
        "output_layer.weight": tensors["lm_head.weight"],
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        there, here = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        heads = [
            tensors[f"{there}self_attn.{name}_proj.weight"].unflatten(0, (CONFIG["num_attention_heads"], -1))
            for name in "qkv"
        ]
        ours[f"{here}self_attention.linear_qkv.weight"] = torch.cat(heads, 1).flatten(0, 1)
        for name, source in {
            "input_layernorm": "input_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
            "self_attention.linear_proj": "self_attn.o_proj",
        }.items():
            ours[f"{here}{name}.weight"] = tensors[f"{there}{source}.weight"]
        gate, experts = f"{there}mlp.gate.", f"{there}mlp.calculator.experts."
        ours[f"{here}mlp.router.weight"] = tensors[f"{gate}gate_network.0.weight"]
        ours[f"{here}mlp.router.output_weight"] = tensors[f"{gate}gate_network.2.weight"]
        ours[f"{here}mlp.router.noise_weight"] = tensors[f"{gate}weight_noise.weight"]
        for expert in range(CONFIG["num_experts"]):
            local = f"{here}mlp.experts.local_experts.{expert}."
            rows = [tensors[f"{experts}weight_{name}.{expert}"] for name in ("gate", "up")]
            ours[f"{local}linear_fc1.weight"] = torch.cat(rows)
            ours[f"{local}linear_fc2.weight"] = tensors[f"{experts}weight_down.{expert}"]
    return ours


def logits_and_gradients_in_training(run_yaml, flags, run_dir, weights):
    """Logits of our model with these weights, and the gradients of the mean loss by name."""
    from megatron_dynmix.model.gpt import unwrap

    chunk = programs.build(run_yaml, flags, run_dir).run.chunks[0]
    model = unwrap(chunk)
    for name, parameter in model.named_parameters():
        rows = weights[name].shape[0]  # those after them pad the vocabulary
        parameter.data.zero_()[:rows] = torch.tensor(weights[name])
    chunk.zero_grad_buffer()
    torch.manual_seed(SEED)
    tokens = tokens_BS()
    here_BS = torch.arange(tokens.shape[1])[None]
    padding_BS = torch.zeros_like(tokens, dtype=torch.bool)
    logits_BSV = chunk(tokens, here_BS, None, padding_mask=padding_BS)[..., : CONFIG["vocab_size"]]
    loss_of(logits_BSV, tokens).backward()
    gradients = {
        name: parameter.main_grad.numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return logits_BSV.detach().numpy(), gradients


def loss_of(logits_BSV, tokens):
    return torch.nn.functional.cross_entropy(logits_BSV[0, :-1], tokens[0, 1:])


@pytest.mark.parametrize(
    "flags",
    [pytest.param([], id="", marks=pytest.mark.slow), pytest.param(full("uniform", 1), id="recomputed")],
)
def test_noise_is_that_of_the_reference_in_logits_and_gradients(flags, run_yaml, tmp_path):
    model = reference().train()
    torch.manual_seed(SEED)
    expected_BSV = model(tokens_BS())
    loss_of(expected_BSV, tokens_BS()).backward()
    assert (expected_BSV - model.eval()(tokens_BS())).abs().max() > 0.1, "noise that changes something"
    weights = {name: tensor.detach().numpy() for name, tensor in as_ours(model.state_dict()).items()}
    flags = [*SHAPE, *ep(1), *flags]
    program = logits_and_gradients_in_training
    logits_BSV, gradients = run_ranks(1, program, run_yaml, flags, tmp_path, weights)[0]
    np.testing.assert_allclose(logits_BSV, expected_BSV.detach().numpy(), atol=1e-4)
    expected = {name: gradient.numpy() for name, gradient in as_ours(gradients_of(model)).items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert np.abs(expected[name]).max() > 1e-5 or "local_experts" in name  # one that no token chose
        np.testing.assert_allclose(gradient[: len(expected[name])], expected[name], atol=1e-4, err_msg=name)


def gradients_of(model):
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(reference(), CONFIG, tmp_path_factory.mktemp("llama-moe"))


LAYOUTS = {"EP2": (2, ep(2)), "TP2": (2, [*TP2, *ep(1)]), "PP2": (2, [*PP2, *ep(1)])}

PADDED = {"EP2": 1152, "TP2": 1280, "PP2": 1152}
"""Rows of the embedding: multiples of 128 times the tensor-parallel size."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_from_the_folder_are_those_of_the_reference(layout, tmp_path):
    folder = save_folder(reference(QUIET), QUIET, tmp_path / "model")
    torch.manual_seed(5)
    rows_BS = torch.randint(CONFIG["vocab_size"], (2, 17))
    model = reference(QUIET)
    logits_BSV = model(rows_BS[:, :-1])
    torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), rows_BS[:, 1:].flatten()).backward()
    names = weight_map(model_settings(QUIET), QUIET, padded_vocab=PADDED[layout])
    expected = logits_BSV.detach().numpy(), as_megatron(InMemory(gradients_of(model)), names)
    check_folders(LAYOUTS[layout], {"": folder}, {"": expected}, rows_BS, tmp_path)


@pytest.mark.parametrize("layout", ["EP2", pytest.param("TP2", marks=pytest.mark.slow)])
def test_frozen_gates_stay_bit_equal_while_the_rest_learns(layout, folder, run_yaml, tmp_path):
    ranks, flags = LAYOUTS[layout]
    settings = yaml.safe_load(run_yaml.read_text())
    settings["model"] = {"load_hf": str(folder), "freeze_router": True, "freeze_expert_gate": True}
    frozen_yaml = run_yaml.with_name("frozen.yaml")  # paths in it are those of its folder
    frozen_yaml.write_text(yaml.safe_dump(settings))
    begin = SHAPE[SHAPE.index("--seq-length") :]
    run_ranks(ranks, programs.train, frozen_yaml, [*begin, *flags], tmp_path)
    before = load_file(folder / "model.safetensors")
    names = weight_map(model_settings(CONFIG), CONFIG, padded_vocab=PADDED[layout])
    trained = as_hugging_face(MegatronCheckpoint(tmp_path / "checkpoints/iter_0000002"), names)
    after = {name: trained.read(name, (0,) * len(shape), shape) for name, shape in trained.shapes.items()}
    assert after.keys() == before.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not [name for name in changed if "gate" in name], "what the paper froze by this word"
    for name in before.keys() - changed:
        # an expert that no token chose has learnt nothing
        assert "gate" in name or "experts.weight_" in name, name
    assert any("weight_up" in name for name in changed)
