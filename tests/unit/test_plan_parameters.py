"""Parameters are counted exactly: rank by rank those of a model that was built, in total those published."""

import json
from concurrent.futures import ProcessPoolExecutor

import pytest
from config_fixtures import good_settings, load

from megatron_dynmix import platform
from tests.deepseek_models import DEEPSEEK_V2_LITE, DEEPSEEK_V3
from tests.distributed.ranks import CONTEXT

platform.start()

from megatron_dynmix.config.megatron import transformer_config  # noqa: E402
from megatron_dynmix.plan.layout import Layout  # noqa: E402
from megatron_dynmix.plan.parameters import model_parameters, stage_parameters  # noqa: E402

SP = {"sequence_parallel": True}
TP2 = {"tensor_model_parallel_size": 2, **SP}
PP2 = {"pipeline_model_parallel_size": 2}
SHARED = {"moe_shared_expert_intermediate_size": 192, "moe_shared_expert_gate": True}
LATENT = {
    **{"multi_latent_attention": True, "qk_layernorm": True, "num_query_groups": 4, "kv_lora_rank": 24},
    **{"q_lora_rank": 40, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8, "v_head_dim": 16, "rope_type": "rope"},
}
"""As DeepSeek has it."""
MOLM = {
    **{
        "preset": "molm-350m-4b",
        "num_layers": 2,
        "hidden_size": 96,
        "kv_channels": 96,
        "ffn_hidden_size": 40,
    },
    **{"vocab_size": 1000, "attention_experts": 5, "num_moe_experts": 6, "router_width": 12},
}
CASES = {
    "one rank": (1, {}, {}),
    "tied": (1, {}, {"untie_embeddings_and_output_weights": False}),
    "EP2": (2, {"expert_model_parallel_size": 2}, {}),
    "TP2": (2, TP2, {"qk_layernorm": True}),
    "TP2 ETP1 EP2": (2, {**TP2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2}, SHARED),
    "PP2 uneven": (2, PP2, {"num_layers": 3, "num_layers_in_first_pipeline_stage": 1}),
    "PP2 tied": (2, PP2, {"untie_embeddings_and_output_weights": False}),
    "PP2 VPP2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}, {"num_layers": 4}),
    "dense layers, shared experts": (4, {**PP2, **TP2}, {**SHARED, "moe_layer_freq": [0, 1]}),
    "biases, LayerNorm": (
        2,
        {**TP2, "expert_tensor_parallel_size": 1},
        {"add_bias_linear": True, "add_qkv_bias": True, "normalization": "LayerNorm", "vocab_size": 1000},
    ),
    "no gate, one group, full-width norms": (
        1,
        {},
        {"gated_linear_unit": False, "num_query_groups": 4, "qk_layernorm_full_width": True},
    ),
    "sinks": (2, {**TP2, "expert_tensor_parallel_size": 1}, {"softmax_type": "learnable"}),
    "router with two layers and noise": (1, {}, {"router_network": "mlp", "router_noise": "idle"}),
    "attention experts": (1, {}, MOLM),
    "attention experts, TP2 ETP1": (2, {**TP2, "expert_tensor_parallel_size": 1}, MOLM),
    "attention experts, EP2 PP2": (4, {"expert_model_parallel_size": 2, **PP2}, MOLM),
    "dense": (1, {}, {"num_moe_experts": None}),
    "latent attention, a dense layer": (
        1,
        {},
        {**LATENT, "moe_layer_freq": [0, 1], "moe_shared_expert_intermediate_size": 192},
    ),
    "latent attention, queries without, TP2": (2, TP2, {**LATENT, "q_lora_rank": None}),
}


def config_of(folder, name):
    _, parallel, model = CASES[name]
    settings = good_settings(folder)
    settings["model"] |= model
    settings["parallel"] = parallel
    return load(folder, settings)


def built_parameters(folder):
    """Of each case and rank the numbers that are replicated and those of experts, of models on this CPU."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_dynmix.model.gpt import build_gpt

    def join(config):
        layout = Layout.of(config, torch.distributed.get_world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=config.parallel.virtual_stages or None,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
        )

    found = {}
    for case, (world_size, _, _) in CASES.items():
        config = config_of(folder, case)
        for rank in range(world_size):
            torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
            join(config)
            model_parallel_cuda_manual_seed(0, force_reset_rng=True)
            transformer = transformer_config(config)
            chunks = transformer.virtual_pipeline_model_parallel_size
            built = [
                (name, parameter.numel())
                for stage in (range(chunks) if chunks else [None])
                for name, parameter in build_gpt(config, transformer, False, stage).named_parameters()
            ]
            expert = sum(numbers for name, numbers in built if ".experts." in name)
            dense = sum(numbers for _, numbers in built) - expert
            stage = parallel_state.get_pipeline_model_parallel_rank()
            found[case, rank] = (stage, dense, expert)
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(built_parameters, tmp_path_factory.mktemp("built")).result(timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_each_rank_has_the_parameters_of_a_model_that_was_built(name, built, tmp_path):
    config = config_of(tmp_path, name)
    transformer = transformer_config(config)
    for rank in range(CASES[name][0]):
        stage, dense, expert = built[name, rank]
        counted = stage_parameters(config, transformer, stage)
        assert (counted.dense, counted.expert) == (dense, expert), f"rank {rank}, stage {stage}"


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("mixtral-8x7b", 46_702_792_704, 12.9e9),
        ("mixtral-8x22b", 140_620_634_112, 39e9),
        ("qwen3-30b-a3b", 30_532_122_624, 3.3e9),
        ("olmoe-1b-7b", 6_919_161_856, 1.3e9),
        ("molm-350m-4b", 4_142_526_464, 418.0e6),
        ("molm-700m-4b", 4_142_526_464, 720.0e6),
        ("molm-700m-8b", 8_182_046_720, 733.0e6),
        ("gpt-oss-20b", 20_914_757_184, 4.19e9),
        ("gpt-oss-120b", 116_829_156_672, 5.71e9),
        (DEEPSEEK_V2_LITE, 15_706_484_224, 2.66e9),
        # its file has 58 x 256 numbers more, which correct the router's scores and get no gradient
        (DEEPSEEK_V3, 671_026_404_352, 37.5e9),
        ("glm-4.5-air", 106_852_245_504, 13.4e9),
        ("glm-4.5", 352_797_814_784, 33.6e9),
        ("glm-4.7-flash", 29_943_390_976, 3.9e9),
        ("kimi-k2", 1_026_408_209_408, 32.9e9),
        ("moonlight-16b-a3b", 15_960_108_544, 2.91e9),
        ("minimax-m2", 228_689_748_992, 11.0e9),
        ("dots.llm1", 142_774_373_888, 14.0e9),
        ("granite-3.0-1b-a400m", 1_334_625_280, 0.429e9),
        ("granite-3.0-3b-a800m", 3_298_788_864, 0.883e9),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_published_models_have_their_number_of_parameters(preset, total, active, tmp_path):
    """As the models' cards have them: 46.7B of which 12.9B active, 141B/39B, 30.5B/3.3B, 6.9B/1.3B.

    Of DeepSeek's 15.7B and 671B, 2.4B and 36.6B, without the embedding, of which a token meets one row; so of
    GLM's 106B, 355B and 30B 12B, 32B and 3B, of Kimi's 1T 32B, of MiniMax's 230B 10B, of dots' 142B 14B.
    gpt-oss counts 3.6B and 5.1B without it, Granite 1.3B/400M and 3.3B/800M.
    """
    settings = good_settings(tmp_path)
    settings["model"] = {"preset": preset}
    if isinstance(preset, dict):
        (tmp_path / "config.json").write_text(json.dumps(preset))
        settings["model"] = {"preset": str(tmp_path)}
    config = load(tmp_path, settings)
    assert model_parameters(config) == total
    assert model_parameters(config, active=True) == pytest.approx(active, rel=0.02)
