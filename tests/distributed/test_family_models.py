"""Families like DeepSeek, and Granite, are the models of transformers in every layout: logits, gradients.

Axes: B rows, S positions, V vocabulary.
"""

import pytest
import torch

from megatron_dynmix.config.presets import read_shape
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.tensors import as_megatron
from tests.distributed.layouts import ETP1, PP2, TP2, ep
from tests.distributed.oracle import check_folders
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
    chosen = TP4_MODELS if layout == "TP4" else MODELS
    folders = {name: models[name][0] for name in chosen}
    expected = {name: models[name][1:] for name in chosen}
    check_folders(LAYOUTS[layout], folders, expected, rows_BS, tmp_path)
