"""What is refused where it cannot run; each message names the setting, what it needs and what would do."""

import dataclasses
from pathlib import Path

import pytest
from config_fixtures import good_settings, load

from megatron_dynmix.config.check import check_settings
from megatron_dynmix.config.host import NEEDS, Host, check_host, joins_rows, with_defaults, without_unmet
from megatron_dynmix.config.leaves import all_leaves
from megatron_dynmix.config.megatron import transformer_config
from megatron_dynmix.config.megatron_fields import unavailable_fields
from megatron_dynmix.config.run_config import DataConfig, ParallelConfig, RunConfig
from megatron_dynmix.errors import InputError

CPU = Host(cuda=False, transformer_engine=False)
PACKAGES = dict.fromkeys(("deep_ep", "hybrid_ep", "fused_weight_gradient_mlp_cuda", "grouped_gemm"), True)
GPU = Host(cuda=True, transformer_engine=True, **PACKAGES)
CUDA = Host(cuda=True, transformer_engine=False)
VALUES = {
    "moe_token_dispatcher_type": "flex",
    "moe_flex_dispatcher_backend": "hybridep",
    "recompute_modules": ["moe_act"],
    "moe_latent_size": 16,
    "cross_entropy_fusion_impl": "te",
    "fp8": "hybrid",
    "fp4": "e2m1",
    "attention_backend": "fused",
}
"""Setting -> a value that asks for what is needed; true for the others."""
SET_HERE = [need for need in NEEDS if need.setting not in unavailable_fields()]
"""Those that the installed Megatron-Core has."""


def settings(folder, name, **others):
    content = good_settings(folder)
    content["training"]["bf16"] = True
    content.setdefault(all_leaves()[name].section, {})[name] = VALUES.get(name, True)
    for section, values in others.items():
        content.setdefault(section, {}).update(values)
    return content


@pytest.mark.parametrize("need", SET_HERE, ids=lambda need: need.setting)
def test_a_setting_is_refused_where_what_it_needs_is_missing(need, tmp_path):
    config = load(tmp_path, settings(tmp_path, need.setting))
    with pytest.raises(InputError) as caught:
        check_host(config, CPU)
    message = str(caught.value)
    assert message.startswith(f"{need.setting} is ")
    assert message.endswith(f", which needs {need.what}; {need.instead}")
    check_host(config, GPU)


def test_why_an_installed_transformer_engine_does_not_do_is_said(tmp_path):
    broken = Host(cuda=True, transformer_engine=False, transformer_engine_error="It cannot be imported")
    with pytest.raises(InputError, match=r"moe_grouped_gemm is true, .*\. It cannot be imp"):
        check_host(load(tmp_path, settings(tmp_path, "moe_grouped_gemm")), broken)
    with pytest.raises(InputError) as caught:
        check_host(load(tmp_path, settings(tmp_path, "nccl_ub")), CPU)
    assert "imported" not in str(caught.value)


@pytest.mark.parametrize("name", ["gradient_accumulation_fusion", "moe_use_legacy_grouped_gemm"])
def test_what_needs_another_package_too_is_refused_without_it(name, tmp_path):
    if name in unavailable_fields():
        pytest.skip(f"{name} is gone in this version of Megatron-Core")
    with pytest.raises(InputError, match=f"{name} is true, which needs .*, and "):
        check_host(load(tmp_path, settings(tmp_path, name)), Host(cuda=True, transformer_engine=True))


def test_flex_is_refused_without_deep_ep_and_hybridep_without_that_part_of_it(tmp_path):
    flex = settings(tmp_path, "moe_token_dispatcher_type", parallel={"expert_model_parallel_size": 2})
    message = "^moe_token_dispatcher_type is flex, which needs CUDA and DeepEP; use alltoall or allgather$"
    with pytest.raises(InputError, match=message):
        check_host(load(tmp_path, flex), CUDA)
    with_it = dataclasses.replace(CUDA, deep_ep=True)
    check_host(load(tmp_path, flex), with_it)
    flex["model"]["moe_flex_dispatcher_backend"] = "hybridep"
    with pytest.raises(
        InputError, match=r"^moe_flex_dispatcher_backend is hybridep, .* HybridEP; use deepep$"
    ):
        check_host(load(tmp_path, flex), with_it)


@pytest.mark.parametrize(
    "others", [{"parallel": {"context_parallel_size": 2}}, {"model": {"softmax_type": "learnable"}}]
)
def test_our_own_attention_refuses_what_only_transformer_engine_has(others, tmp_path):
    config = load(tmp_path, settings(tmp_path, "attention_backend", **others))
    with pytest.raises(InputError, match=r"attention_backend is fused, which needs .*softmax_type vanilla"):
        check_host(config, GPU)


def test_a_window_is_refused_under_context_parallelism(tmp_path):
    others = {"parallel": {"context_parallel_size": 2}, "model": {"window_size": [8, 0]}}
    with pytest.raises(InputError, match="window_size is given and context_parallel_size is 2"):
        check_settings(load(tmp_path, settings(tmp_path, "attention_backend", **others)), 2)


def test_an_attention_that_turns_off_all_kernels_is_refused(tmp_path):
    config = load(tmp_path, settings(tmp_path, "attention_backend", model={"attention_backend": "local"}))
    with pytest.raises(InputError, match=r"attention_backend is local, .*; use auto"):
        check_host(config, GPU)


def test_our_own_norms_refuse_what_only_transformer_engine_has(tmp_path):
    name = "layernorm_zero_centered_gamma"
    config = load(tmp_path, settings(tmp_path, name, model={"qk_layernorm_full_width": True}))
    with pytest.raises(InputError, match=f"{name} is true, which needs Transformer Engine's norms"):
        check_host(config, GPU)


def test_the_documented_needs_are_these():
    text = (Path(__file__).parents[2] / "docs/layouts.md").read_text()
    for need in NEEDS:
        assert f"| `{need.setting}" in text and f"| {need.what} |" in text, need.setting


@pytest.mark.parametrize("need", SET_HERE, ids=lambda need: need.setting)
def test_a_run_meant_for_another_host_can_be_checked_here(need, tmp_path):
    config = load(tmp_path, settings(tmp_path, need.setting))
    transformer_config(without_unmet(config, CPU))


def test_what_a_host_can_follow_and_what_shapes_the_model_stays_in_a_run_meant_for_another(tmp_path):
    content = settings(tmp_path, "moe_grouped_gemm")
    content["model"] |= {"recompute_modules": ["moe"], "moe_latent_size": 16}
    config = load(tmp_path, content)
    given = dict(config.model.megatron)
    assert without_unmet(config, GPU) == config
    del given["moe_grouped_gemm"]
    assert without_unmet(config, CPU).model.megatron == given


def test_what_a_cpu_can_do_passes(tmp_path):
    content = good_settings(tmp_path)
    content["model"] |= {"moe_token_dispatcher_type": "allgather", "recompute_modules": ["moe"]}
    content["parallel"] |= {"overlap_grad_reduce": True}
    check_host(load(tmp_path, content), CPU)


def test_an_interleaved_pipeline_without_overlap_needs_nccl(tmp_path):
    content = good_settings(tmp_path)
    stages = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    content["parallel"] = {**stages, "overlap_p2p_comm": False}
    content["training"]["bf16"] = True
    config = load(tmp_path, content)
    with pytest.raises(
        InputError, match=r"needs NCCL: over gloo its messages mix.*leave out overlap_p2p_comm"
    ):
        check_host(config, CPU)
    check_host(config, GPU)


@pytest.mark.parametrize(
    ("training", "model", "parts"),
    [
        ({}, {}, "bf16 only; add --bf16"),
        (
            {"bf16": True},
            {"moe_router_load_balancing_type": "seq_aux_loss"},
            "use aux_loss or global_aux_loss",
        ),
        (
            {"bf16": True},
            {"multi_latent_attention": True, "num_query_groups": 2, "num_attention_heads": 4},
            "num_query_groups is 2, .* each of the 4 heads, .* give num_query_groups 4",
        ),
    ],
)
def test_rows_joined_for_transformer_engine_have_limits_that_a_mask_has_not(training, model, parts, tmp_path):
    content = good_settings(tmp_path)
    content["training"] |= training
    content["model"] |= model
    with pytest.raises(InputError, match=parts):
        check_host(load(tmp_path, content), GPU)
    content["parallel"]["context_parallel_size"] = 2
    check_host(load(tmp_path, content), GPU)
    content["data"]["segment_multiple"] = 8  # joined all the same
    with pytest.raises(InputError, match=parts):
        check_host(load(tmp_path, content), GPU)


@pytest.mark.parametrize(
    ("engine", "cp", "multiple", "joined"),
    [
        *((False, 1, 8, False), (False, 2, 4, False), (True, 1, 1, True), (True, 2, 1, False)),
        *((True, 2, 4, True), (True, 2, 6, False), (True, 4, 4, False), (True, 4, 16, True)),
    ],
)
def test_rows_are_joined_where_every_rank_gets_two_parts_of_a_segment(engine, cp, multiple, joined):
    config = RunConfig(
        data=DataConfig(segment_multiple=multiple),
        parallel=ParallelConfig(megatron={"context_parallel_size": cp}),
    )
    assert joins_rows(config, engine) is joined


YARN = {"rope_type": "yarn", "rotary_scaling_factor": 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("host", "model", "fused"),
    [
        (GPU, {}, True),
        (CPU, {}, None),
        (CUDA, {}, None),
        (GPU, {"apply_rope_fusion": False}, False),
        (GPU, {"rotary_interleaved": True}, None),
        (GPU, YARN, None),
        (GPU, {"multi_latent_attention": True, "kv_channels": None}, None),
    ],
    ids=["TE", "CPU", "CUDA", "said", "interleaved", "yarn", "latent"],
)
def test_rotary_fusion_is_on_where_it_is_there_and_right(host, model, fused, tmp_path):
    content = good_settings(tmp_path)
    content["model"].update(model)
    config = load(tmp_path, content)
    completed = with_defaults(config, host)
    assert completed.model.megatron.get("apply_rope_fusion") is fused
    assert config.model.megatron.get("apply_rope_fusion") == model.get("apply_rope_fusion"), "not on record"
    assert dataclasses.replace(completed, model=config.model, parallel=config.parallel) == config


def test_a_fused_kernel_that_would_rotate_otherwise_is_refused(tmp_path):
    config = load(tmp_path, settings(tmp_path, "apply_rope_fusion", model={"rotary_interleaved": True}))
    with pytest.raises(InputError, match="leave out apply_rope_fusion"):
        check_host(config, GPU)


def test_outputs_of_a_pipeline_are_let_go_but_where_gloo_may_still_send_them(tmp_path):
    content = good_settings(tmp_path)
    stages = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    for parallel, on_cpu in (({"pipeline_model_parallel_size": 2}, True), (stages, False)):
        content["parallel"] = parallel
        config = load(tmp_path, content)
        assert transformer_config(with_defaults(config, CPU)).deallocate_pipeline_outputs is on_cpu
        assert transformer_config(with_defaults(config, CUDA)).deallocate_pipeline_outputs
        check_host(config, CPU)
    content["parallel"] = {**stages, "deallocate_pipeline_outputs": True}
    with pytest.raises(InputError, match="deallocate_pipeline_outputs is true with overlap_p2p_comm"):
        check_host(load(tmp_path, content), CPU)


@pytest.mark.parametrize("given", [{}, {"bias_dropout_fusion": False}])
def test_dropout_is_fused_on_cuda_unless_it_is_told_not_to(given, tmp_path):
    content = good_settings(tmp_path)
    content["model"] |= given
    config = load(tmp_path, content)
    assert not transformer_config(with_defaults(config, CPU)).bias_dropout_fusion
    assert transformer_config(with_defaults(config, CUDA)).bias_dropout_fusion is not bool(given)
