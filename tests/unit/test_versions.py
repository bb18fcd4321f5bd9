"""What differs between the releases of Megatron-Core, on the one that is installed."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dynmix import platform
from megatron_dynmix.platform import versions

platform.start()
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402


@pytest.mark.parametrize("experts", [None, 4])
def test_the_spec_of_an_moe_is_told_from_a_dense_one(experts):
    mlp = get_gpt_layer_local_spec(num_experts=experts).submodules.mlp
    assert (versions.moe_parts(mlp) is None) == (experts is None)
    assert experts is None or hasattr(versions.moe_parts(mlp), "router")


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_queries_without_a_latent_have_no_norm_before_their_projection(layers):
    config_of = pytest.importorskip("megatron.core.transformer.mla_qk_norm_config").QKNormConfigResolver
    for _ in range(2):
        versions.keep_query_projection()
    config = SimpleNamespace(
        **{"q_lora_rank": None, "qk_layernorm": True, "qk_l2_norm": False, "transformer_impl": layers},
        **{"experimental_attention_variant": None, "normalization": "RMSNorm"},
    )
    spec = SimpleNamespace(
        **dict.fromkeys(("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj"), ColumnParallelLinear),
        **{"q_layernorm": IdentityOp, "kv_layernorm": torch.nn.RMSNorm},
    )
    assert config_of(config, spec).resolve()["linear_q_proj"] is ColumnParallelLinear


def test_a_recomputed_output_is_seen_by_every_view_of_its_place():
    place = torch.zeros(4)
    view = place.view(2, 2)
    place.untyped_storage().resize_(0)
    versions._copy_storage(place, torch.arange(4.0))
    assert view.tolist() == [[0, 1], [2, 3]]
