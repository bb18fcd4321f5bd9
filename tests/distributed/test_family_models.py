"""Families that share parts with DeepSeek are the models of transformers in every layout: logits, gradients.

Axes: B rows, S positions, V vocabulary.
"""

import numpy as np
import pytest
import torch
import yaml

from megatron_dynmix.config.presets import read_shape
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.tensors import as_megatron
from tests.distributed import convert_programs
from tests.distributed.layouts import ETP1, PP2, TP2, ep
from tests.distributed.ranks import run_ranks
from tests.family_models import MODELS, SIZES, tiny_model
from tests.unit.convert_fixtures import InMemory

LAYOUTS = {
    "EP2": (2, ep(2)),
    "TP2": (2, TP2),
    "PP2": (2, [*PP2, "--num-layers-in-first-pipeline-stage", "1"]),
    "TP4": (4, ["--tensor-model-parallel-size", "4", "--sequence-parallel", *ETP1]),
}
"""The last has more tensor-parallel ranks than there are KV groups."""
TP4_MODELS = ("MiniMax-M2",)


@pytest.fixture(scope="module")
def rows_BS():
    torch.manual_seed(5)
    return torch.randint(SIZES["vocab_size"], (2, 25))


@pytest.fixture(scope="module")
def models(rows_BS, tmp_path_factory):
    """Name -> folder, logits [B, S, V], and gradients under the names of a checkpoint."""
    found = {}
    for name in MODELS:
        heads = {"num_attention_heads": 8} if name in TP4_MODELS else {}
        model, folder = tiny_model(name, **heads), tmp_path_factory.mktemp("family")
        model.save_pretrained(folder)
        logits_BSV = model.eval()(rows_BS[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), rows_BS[:, 1:].flatten()).backward()
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        gradients = {
            key: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for key, tensor in values.items()
            if isinstance(tensor, torch.nn.Parameter) or "correction_bias" in key
        }
        names = weight_map(read_shape(folder), model.config.to_dict(), fused_experts=True, padded_vocab=512)
        found[name] = folder, logits_BSV.detach().numpy(), as_megatron(InMemory(gradients), names)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_those_of_transformers(layout, models, rows_BS, tmp_path):
    ranks, flags = LAYOUTS[layout]
    chosen = {name: models[name] for name in (TP4_MODELS if layout == "TP4" else MODELS)}
    settings = {
        "model": {"moe_aux_loss_coeff": 0.0},
        "parallel": {"use_distributed_optimizer": False},
        "data": {"seq_length": rows_BS.shape[1] - 1},
        "training": {"micro_batch_size": 1, "global_batch_size": 2, "train_iters": 1},
    }
    (tmp_path / "RUN.yaml").write_text(yaml.safe_dump(settings))
    folders = {name: folder for name, (folder, _, _) in chosen.items()}
    program = convert_programs.logits_and_gradients
    answers = run_ranks(ranks, program, tmp_path / "RUN.yaml", folders, flags, rows_BS)
    for name, (_, logits_BSV, gradients) in chosen.items():
        seen = [answer[name] for answer in answers]
        parts = [np.stack([row for _, row in rank["logits"]]) for rank in seen if rank["logits"]]
        # TP ranks hold parts of the vocabulary, EP ranks rows, and of pipeline stages the last holds all
        ours_BSV = np.concatenate(parts, -1 if layout.startswith("TP") else 0)[..., : SIZES["vocab_size"]]
        np.testing.assert_allclose(ours_BSV, logits_BSV, atol=1e-4, err_msg=name)
        for key, offset, gradient in (entry for rank in seen for entry in rank["gradients"]):
            if not key.endswith("expert_bias"):  # which is not learnt by gradients
                wanted = gradients.read(key, offset, gradient.shape).numpy()
                np.testing.assert_allclose(gradient, wanted, atol=1e-4, err_msg=f"{name}: {key}")
        assert {key for rank in seen for key, _, _ in rank["gradients"]} == gradients.shapes.keys(), name
