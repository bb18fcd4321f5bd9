"""A setting whose master is off is refused with both names; with the master on it is taken.

What nobody gave by hand, the values of presets and of Megatron-Core, is never refused.
"""

import typing

import pytest
from config_fixtures import good_settings, load

from megatron_dynmix.config.check import check_run
from megatron_dynmix.config.idle import MASTERS, check_idle
from megatron_dynmix.config.leaves import all_leaves, refused
from megatron_dynmix.config.megatron_fields import megatron_fields
from megatron_dynmix.config.presets import COMMON, PRESETS, complete_model
from megatron_dynmix.config.run_config import SECTIONS, RunConfig
from megatron_dynmix.errors import InputError

LATENT, FP8, FLEX = (
    {"multi_latent_attention": True},
    {"fp8": "hybrid"},
    {"moe_token_dispatcher_type": "flex"},
)
TYPE = "moe_router_load_balancing_type"
OFF = {
    "num_moe_experts is set": {"num_moe_experts": None},
    f"{TYPE} is aux_loss, seq_aux_loss or global_aux_loss": {TYPE: "none"},
    f"{TYPE} is another one than sinkhorn": {TYPE: "sinkhorn"},
    "moe_flex_dispatcher_backend is deepep": {**FLEX, "moe_flex_dispatcher_backend": "hybridep"},
    "moe_flex_dispatcher_backend is hybridep": FLEX,
    "fp8_recipe is delayed": {**FP8, "fp8_recipe": "mxfp8"},
    "fp8_recipe is delayed or tensorwise": {**FP8, "fp8_recipe": "blockwise"},
    "fp8_recipe is custom": FP8,
    "fp4_recipe is custom": {"fp4": "e2m1"},
    "first_last_layers_bf16 is true": FP8,
    "gated_linear_unit is true": {"gated_linear_unit": False},
    "bias_activation_fusion is false": {"bias_activation_fusion": True},
    "multi_latent_attention is false": LATENT,
    "rope_type is yarn": {**LATENT, "rope_type": "rope"},
    "rope_type is rope": LATENT,
    "perform_initialization is true": {"perform_initialization": False},
    "batch_p2p_comm is true": {"pipeline_model_parallel_size": 2, "batch_p2p_comm": False},
    "use_distributed_optimizer is true": {"use_distributed_optimizer": False},
    "weight_decay is above 0": {"qk_layernorm": True},
}
"""What has a master off that is on in a plain run, and the outer masters on."""
CASES = [(master.words, name) for master in MASTERS for name in master.settings if name not in refused()]


def given(settings, preset="tiny"):
    """Return the run of a preset with these settings in the sections where they belong."""
    sections = {name: {} for name in SECTIONS} | {"model": {"preset": preset}}
    for name, value in settings.items():
        sections[all_leaves()[name].section][name] = value
    sections["model"] = complete_model(sections["model"])
    return RunConfig(**{name: kind.from_flat(sections[name]) for name, kind in SECTIONS.items()})


def unusual(name):
    """Return a value that neither Megatron-Core nor a preset has for a setting."""
    field = next(fields[name] for fields in megatron_fields().values() if name in fields)
    kinds = [field.hint, *typing.get_args(field.hint)]
    if name == "rotary_percent":
        return 0.5  # a share, which the file is already held to
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return next(
                value for value in typing.get_args(kind) if value not in (field.default, COMMON.get(name))
            )
    if bool in kinds:
        return not field.default
    if int in kinds or float in kinds:
        return 3 if field.default != 3 else 5
    return "made_up" if str in kinds else ["moe"]


@pytest.mark.parametrize(("words", "name"), CASES)
def test_a_setting_whose_master_is_off_is_refused_with_both_names(words, name):
    said = f"{name} is .*, which does nothing unless {words}; see to that, or leave out {name}"
    config = given({**OFF.get(words, {}), name: unusual(name)})
    with pytest.raises(InputError, match=f"^{said}$"):
        check_idle(config)


def test_every_master_is_tried_with_what_has_it_off():
    assert OFF.keys() <= {words for words, _ in CASES}


@pytest.mark.parametrize(
    "settings",
    [
        {**FP8, "fp8_margin": 1, "fp8_wgrad": False, "fp8_param": True, "tp_only_amax_red": True},
        {**FP8, "fp8_recipe": "tensorwise", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 0},
        {**FP8, "fp8_recipe": "tensorwise", "fp8_dot_product_attention": True},
        {"fp4": "e2m1", "fp4_recipe": "custom", "fp4_quantizer_factory": "made.up"},
        {"cpu_offloading": True, "cpu_offloading_num_layers": 1, "cpu_offloading_weights": True},
        {**FLEX, "moe_deepep_num_sms": 4},
        {**FLEX, "moe_flex_dispatcher_backend": "hybridep", "moe_hybridep_num_sms": 4},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"moe_layer_recompute": True, "recompute_modules": ["mlp"]},
        {TYPE: ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.2]},
        {"moe_expert_capacity_factor": 1.5, "moe_pad_expert_input_to_capacity": True},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_shared_expert_intermediate_size": 64, "moe_shared_expert_gate": True},
        {**LATENT, "beta_fast": 16, "mscale": 0.5},
        {**LATENT, "rope_type": "rope", "rotary_percent": 0.5},
        {"pipeline_model_parallel_size": 2, "batch_p2p_sync": False, "deallocate_pipeline_outputs": True},
        {"overlap_grad_reduce": True, "bucket_size": 1000},
        {"weight_decay": 0.1, "qk_layernorm": True, "apply_wd_to_qk_layernorm": True},
        {"use_precision_aware_optimizer": True, "bf16": True, "store_param_remainders": False},
        {"decoupled_lr": 1e-4, "decoupled_min_lr": 1e-5},
    ],
    ids=lambda settings: list(settings)[-1],
)
def test_with_its_master_on_a_setting_is_taken(settings):
    check_idle(given(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"fp8_margin": 0},
        {"num_moe_experts": None},
        {TYPE: "none"},
        {TYPE: "none", "moe_aux_loss_coeff": 0.01},
        {**LATENT, "num_query_groups": 4, "kv_channels": 32},
    ],
)
def test_a_value_that_nobody_chose_is_taken(settings):
    check_idle(given(settings))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_taken_with_other_masters_off(preset):
    for settings in ({}, {"num_moe_experts": None}, {TYPE: "sinkhorn"}, {"gated_linear_unit": False}):
        check_idle(given(settings, preset))


def test_a_run_is_refused_for_it_in_the_file_and_as_a_flag(tmp_path):
    content, said = good_settings(tmp_path), "fp8_margin is 2, which does nothing unless fp8 is set"
    with pytest.raises(InputError, match=said):
        check_run(load(tmp_path, content, ["--fp8-margin", "2"]), 2)
    content["model"]["fp8_margin"] = 2
    with pytest.raises(InputError, match=said):
        check_run(load(tmp_path, content), 2)
