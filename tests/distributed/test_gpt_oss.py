"""gpt-oss from a folder is the model of transformers: logits, gradients, in any layout.

Axes: B rows, S positions, V vocabulary.
"""

import pytest
import torch

from megatron_dynmix.config.presets import read_shape
from megatron_dynmix.convert.interleaved import as_families
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.tensors import as_megatron
from tests.distributed.layouts import ETP1, PP2, TP2, ep
from tests.distributed.oracle import check_folders
from tests.unit.convert_fixtures import ODD, InMemory, tiny_model

VOCAB = ODD["vocab_size"]
LAYOUTS = {
    "one rank": (1, []),
    "EP2": (2, ep(2)),
    "TP2": (2, [*TP2, *ETP1]),
    "PP2": (2, PP2),
}


@pytest.fixture(scope="module")
def model():
    # heads that two tensor-parallel ranks can share out
    return tiny_model("gpt_oss", num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt_oss")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows_BS():
    torch.manual_seed(5)
    return torch.randint(VOCAB, (2, 25))  # past the window, and where YaRN's original positions end


@pytest.fixture(scope="module")
def expected(model, folder, rows_BS):
    """Logits [B, S, V], and gradients under the names of a checkpoint."""
    model.set_experts_implementation("eager")
    logits_BSV = model.eval()(rows_BS[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), rows_BS[:, 1:].flatten()).backward()
    config = model.config.to_dict()
    held = as_families(InMemory({key: values.grad for key, values in model.named_parameters()}), config)
    names = weight_map(read_shape(folder), config, fused_experts=True, padded_vocab=256)
    return logits_BSV.detach().numpy(), as_megatron(held, names)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_those_of_transformers(layout, folder, expected, rows_BS, tmp_path):
    check_folders(LAYOUTS[layout], {"it": folder}, {"it": expected}, rows_BS, tmp_path)
