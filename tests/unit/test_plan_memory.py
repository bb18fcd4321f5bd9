"""Memory is estimated from formulas: held against what a model on this CPU keeps, and worked examples."""

import dataclasses
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from config_fixtures import good_settings, load
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_dynmix import platform
from tests.distributed.ranks import CONTEXT, run_ranks

platform.start()

from megatron_dynmix.config.host import Host  # noqa: E402
from megatron_dynmix.config.megatron import transformer_config  # noqa: E402
from megatron_dynmix.plan.layout import Layout  # noqa: E402
from megatron_dynmix.plan.memory import (  # noqa: E402  # noqa: E402
    Layer,
    checkpoint_bytes,
    memory_by_stage,
    passes_in_flight,
    stage_activations,
)

ROWS, LENGTH, WORLD = 2, 128, 2
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SHARED = {"moe_shared_expert_intermediate_size": 192}
LATENT = {
    **{"multi_latent_attention": True, "qk_layernorm": True, "num_query_groups": 4, "kv_lora_rank": 48},
    **{"q_lora_rank": 80, "qk_head_dim": 24, "qk_pos_emb_head_dim": 16, "v_head_dim": 40},
    "rope_type": "rope",
}
"""As DeepSeek has it, but for values as wide as keys."""
MOLM = {
    **{
        "preset": "molm-700m-4b",
        "num_layers": 2,
        "hidden_size": 128,
        "kv_channels": 128,
        "ffn_hidden_size": 192,
    },
    **{"attention_experts": 6, "num_moe_experts": 8, "router_width": 24},
}
"""Attention experts, of which a token attends with four."""
KEPT = {
    "tiny": ({}, {}, {}),
    "dense": ({"num_moe_experts": None}, {}, {}),
    "dense, TP2": ({"num_moe_experts": None}, TP2, {}),
    "shared experts": (SHARED, {}, {}),
    "bf16": ({}, {}, {"bf16": True}),
    "top-4, narrow experts": ({"moe_router_topk": 4, "moe_ffn_hidden_size": 64}, {}, {}),
    "fused activation": ({"num_moe_experts": None, "bias_activation_fusion": True}, {}, {}),
    "fused activation of experts": ({"bias_activation_fusion": True}, {}, {}),
    "full recomputation": (FULL, {}, {}),
    "full, one layer of two": ({**FULL, "recompute_method": "block"}, {}, {}),
    "latent attention": (LATENT, {}, {}),
    "latent attention, up projections again": (
        {**LATENT, "recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]},
        {},
        {},
    ),
    "latent attention, narrow values": ({**LATENT, "v_head_dim": 24}, {}, {}),
    "latent attention, dense, TP2": ({**LATENT, "q_lora_rank": None, "num_moe_experts": None}, TP2, {}),
    "attention experts": (MOLM, {}, {}),
    "moe again": ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, {}, {}),
}
CPU = Host(cuda=False, transformer_engine=False)
TOLERANCE = {"full recomputation": 0.05}
"""Not counted: masks that recomputation keeps. All others: 2%."""


def config_of(folder, name):
    model, parallel, training = KEPT[name]
    settings = good_settings(folder)
    settings["model"] |= {"vocab_size": 256, **model}
    settings["parallel"] = parallel
    settings["data"]["seq_length"] = LENGTH
    settings["training"] |= {"micro_batch_size": ROWS, **training}
    return load(folder, settings)


def kept_bytes(config):
    """Bytes of all but parameters that autograd keeps of one micro-batch, on a rank of a joined job."""
    import torch
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    from megatron_dynmix.model.gpt import build_gpt

    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    transformer = transformer_config(config)
    model = build_gpt(config, transformer, False).train()
    model = Float16Module(transformer, model) if config.training.bf16 else model
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that none takes its place
        return tensor

    torch.manual_seed(torch.distributed.get_rank() // Layout.of(config, WORLD).tp)
    tokens = torch.randint(0, 256, (ROWS, LENGTH))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).expand(ROWS, 1, -1, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, torch.arange(LENGTH).expand(ROWS, -1), mask, labels=tokens)
    return sum(storage.nbytes() for storage in kept.values())  # what is computed again has been let go


def kept_alone(folder):
    """Of each case, on a rank whose others do not exist."""
    import torch
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = {}
    for case in KEPT:
        config = config_of(folder, case)
        tp = config.parallel.size("tensor_model_parallel_size")
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
        parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=False)
        found[case] = kept_bytes(config)
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    return found


def kept_together(configs):
    """Of each configuration, on a rank of a real job: experts get the tokens that others send."""
    from megatron.core import parallel_state

    from megatron_dynmix.training.run import join_job

    found = []
    for config in configs:
        join_job(config)
        found.append(kept_bytes(config))
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(kept_alone, tmp_path_factory.mktemp("kept")).result(timeout=120)


@pytest.mark.parametrize("name", KEPT)
def test_activations_are_those_that_autograd_keeps(name, measured, tmp_path):
    config = config_of(tmp_path, name)
    tp = config.parallel.size("tensor_model_parallel_size")
    layout = Layout.of(config, tp)
    estimate = stage_activations(config, transformer_config(config), layout, CPU, stage=0, micro_batches=1)
    softmax = estimate.logits // 6 * 4 if config.training.bf16 else estimate.logits  # all that is kept
    assert estimate.layers + softmax == pytest.approx(measured[name], rel=TOLERANCE.get(name, 0.02))


LAYOUTS = {
    "EP2": {"expert_model_parallel_size": 2},
    "TP2 ETP2": {**TP2, "expert_tensor_parallel_size": 2},
    "TP2 ETP1 EP2": {**TP2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2},
}


def test_ranks_together_keep_what_is_estimated_for_each(tmp_path):
    """On average over the ranks: a router that was never trained is not in balance."""
    configs = []
    for parallel in LAYOUTS.values():
        settings = good_settings(tmp_path)
        settings["model"]["vocab_size"], settings["parallel"] = 256, parallel
        settings["data"]["seq_length"] = LENGTH
        configs.append(load(tmp_path, settings))
    by_rank = run_ranks(WORLD, kept_together, configs)
    for config, name, *kept in zip(configs, LAYOUTS, *by_rank, strict=True):
        layout = Layout.of(config, WORLD)
        estimate = stage_activations(
            *(config, transformer_config(config), layout, CPU), stage=0, micro_batches=1
        )
        assert sum(kept) / WORLD == pytest.approx(estimate.layers + estimate.logits, rel=0.02), name


GPU = Host(cuda=True, transformer_engine=True)


def settings_of(folder, model, parallel, **training):
    settings = good_settings(folder)
    settings["model"], settings["parallel"] = model, parallel
    settings["data"]["seq_length"] = 4096
    settings["training"] |= {"micro_batch_size": 1, "global_batch_size": 128, "bf16": True, **training}
    return load(folder, settings)


def test_states_of_a_parameter_are_18_bytes_of_which_12_are_shared_by_its_replicas(tmp_path):
    """EP 8 on 16 ranks: 16 replicas of everything else, two of each expert."""
    config = settings_of(tmp_path, {"preset": "mixtral-8x7b"}, {"expert_model_parallel_size": 8})
    (stage,) = memory_by_stage(config, Layout.of(config, 16), GPU)
    dense, expert = stage.parameters.dense, stage.parameters.expert
    assert expert * 8 + dense == 46_702_792_704
    assert (stage.weights, stage.gradients) == (2 * (dense + expert), 4 * (dense + expert))
    assert stage.optimizer == 12 * dense // 16 + 12 * expert // 2
    parallel = {"expert_model_parallel_size": 8, "num_distributed_optimizer_instances": 2}
    config = settings_of(tmp_path, {"preset": "mixtral-8x7b"}, parallel)
    assert memory_by_stage(config, Layout.of(config, 16), GPU)[0].optimizer == 12 * dense // 8 + 12 * expert
    parallel = {"expert_model_parallel_size": 8, "use_distributed_optimizer": False}
    config = settings_of(tmp_path, {"preset": "mixtral-8x7b"}, parallel)
    (stage,) = memory_by_stage(config, Layout.of(config, 16), GPU)
    assert stage.weights + stage.gradients + stage.optimizer == 18 * (dense + expert)


def test_without_mixed_precision_a_parameter_has_no_master_weights(tmp_path):
    config = settings_of(tmp_path, {"preset": "tiny"}, {}, bf16=False)
    (stage,) = memory_by_stage(config, Layout.of(config, 1), CPU)
    assert stage.weights + stage.gradients + stage.optimizer == 16 * stage.parameters.total
    assert checkpoint_bytes(config, 10) == 120


def test_the_first_stage_of_a_pipeline_keeps_the_most_passes(tmp_path):
    model = {"preset": "mixtral-8x7b"}
    config = settings_of(tmp_path, model, {"pipeline_model_parallel_size": 4})
    transformer = transformer_config(config)
    assert [passes_in_flight(transformer, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [passes_in_flight(transformer, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    parallel = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    transformer = transformer_config(settings_of(tmp_path, model, parallel))
    assert [passes_in_flight(transformer, stage, 8) for stage in range(4)] == [11, 9, 7, 5]


def test_padded_segments_need_no_mask_under_context_parallelism(tmp_path):
    """At 131,072 positions and CP 8: 4 GiB of mask a layer and seven gathered copies of the keys, or one."""
    model, length = {"preset": "mixtral-8x7b", "max_position_embeddings": 131072}, 131072
    kept = {}
    for multiple in (1, 16):
        config = settings_of(tmp_path, model, {"context_parallel_size": 8})
        data = dataclasses.replace(config.data, seq_length=length, segment_multiple=multiple)
        config = dataclasses.replace(config, data=data)
        layer = Layer(config, transformer_config(config), Layout.of(config, 8), GPU)
        kept[multiple] = layer.bytes_kept(is_moe=True)
    keys = 2 * 2 * 8 * 128 * length // 8
    tables = 2 * 4 * 128 * (length - length // 8)
    assert kept[1] - kept[16] == 2 * length * length // 8 + 6 * keys - tables
    assert 2 * length * length // 8 == 4 * 2**30


def test_a_dense_layer_keeps_what_the_paper_says(tmp_path):
    """GPT of Korthikanti et al. with attention that keeps no scores: 34 s b h / t.

    Two of the 34 are dropout masks, which we do not have; instead rotated queries and keys are kept (4), and
    tables to rotate them by.
    """
    model = {
        **{"num_layers": 1, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16},
        **{"num_query_groups": 16, "num_moe_experts": None, "gated_linear_unit": False},
    }
    config = settings_of(tmp_path, model, TP2)
    kept = Layer(config, transformer_config(config), Layout.of(config, 2), GPU).bytes_kept(is_moe=False)
    assert kept - 2 * 4 * 4096 * 64 == (34 - 2 + 4) * 4096 * 1024 // 2


def test_without_transformer_engine_float32_keeps_the_scores_of_grouped_queries(tmp_path):
    """On CUDA no other kernel of torch's takes them; what that one keeps is looked up in torch itself."""
    host, layers = Host(cuda=True, transformer_engine=False), {}
    for groups in (2, 4):
        model = {"preset": "tiny", "num_attention_heads": 4, "num_query_groups": groups, "kv_channels": 16}
        config = settings_of(tmp_path, model, {}, bf16=False)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=64))
        layer = Layer(config, transformer_config(config), Layout.of(config, 1), host)
        layers[groups] = layer.bytes_kept(is_moe=True)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    query, key, value = (torch.randn(1, heads, 64, 16).requires_grad_() * 1 for heads in (4, 2, 2))
    allowed = torch.ones(64, 64, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        output = scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)
    grouped = sum(kept.values()) + output.nbytes
    each = 6 * output.nbytes + 4 * 64 * 64  # as many keys as queries: three of each, and the mask in numbers
    assert layers[2] - layers[4] == grouped - each
    half = dataclasses.replace(config, training=dataclasses.replace(config.training, bf16=True))
    assert not Layer(half, transformer_config(half), Layout.of(half, 1), host)._keeps_scores
