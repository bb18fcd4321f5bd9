"""What is refused before a run starts; each message names what was given and what would work."""

import re
from pathlib import Path
from typing import Any

import pytest
from config_fixtures import good_settings, load

from megatron_dynmix.config.check import check_run
from megatron_dynmix.config.check.data import check_data, check_tokenizer
from megatron_dynmix.config.megatron import check_with_megatron
from megatron_dynmix.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
NONE = object()
"""Takes a setting away."""
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


EXPERT_BIAS = {"model.moe_router_enable_expert_bias": True, "model.moe_router_score_function": "sigmoid"}
EXPERT_TENSOR_1 = {"expert_tensor_parallel_size": 1}


def changed(folder: Path, changes: dict[str, Any]) -> dict:
    """The good settings with `section.name[.name...]` set to other values."""
    content = good_settings(folder)
    for where, value in changes.items():
        *parents, last = where.split(".")
        target: dict = content
        for parent in parents:
            target = target.setdefault(parent, {})
        if value is NONE:
            del target[last]
        else:
            target[last] = value
    return content


def refused(folder: Path, changes: dict[str, Any], world_size: int = 2) -> str:
    config = load(folder, changed(folder, changes))
    with pytest.raises(InputError) as caught:
        check_run(config, world_size)
        check_with_megatron(config)
    return str(caught.value)


@pytest.mark.parametrize("apart", [{"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 2}])
def test_experts_are_not_gathered_before_they_are_stepped(tmp_path, apart):
    gathering = {**INTERLEAVED, "overlap_grad_reduce": True, "overlap_param_gather": True}
    changes = {"model.num_layers": 4, "optimizer.overlap_param_gather_with_optimizer_step": True}
    check_run(load(tmp_path, changed(tmp_path, {**changes, "parallel": gathering})), world_size=4)
    message = refused(tmp_path, {**changes, "parallel": {**gathering, **apart}}, world_size=4)
    assert message.startswith("overlap_param_gather_with_optimizer_step is true with experts divided")


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_good_run_passes(tmp_path, world_size):
    check_run(load(tmp_path, good_settings(tmp_path)), world_size)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixing.strategy": "fixed", "data.sources.chat.probe": NONE},
        {"mixing.signal": "train", "data.sources.chat.probe": NONE},
        {"mixing.strategy": "uniform", "data.sources.chat.probe": NONE},
        {"mixing.strategy": "fixed", "data.sources": {"chat": {"path": "chat.jsonl", "weight": 3}}},
        {"mixing.strategy": "fixed", "model.num_moe_experts": None, "parallel": {}},
        {
            "data.sources.chat.weight": 0,
            "data.sources.math.weight": 1,
            "data.sources.code.weight": 2,
        },
        {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        {"parallel": {"context_parallel_size": 2}},
        {"parallel": INTERLEAVED, "model.num_layers": 4},
        {"model.moe_expert_capacity_factor": 1.0},
        {"model.freeze_router": True, **EXPERT_BIAS},
        {"model.freeze_router": True, **EXPERT_BIAS, "model.moe_router_bias_update_rate": 0.0},
        {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, **EXPERT_TENSOR_1}},
        {"model.recompute_granularity": "full", "model.recompute_method": "uniform"},
    ],
)
def test_other_good_runs_pass(tmp_path, changes):
    content = changed(tmp_path, changes)
    if "recompute_method" in content["model"]:
        content["model"]["recompute_num_layers"] = 1
    check_run(load(tmp_path, content), 2)


def test_a_prepared_prefix_stands_for_its_source(tmp_path):
    (tmp_path / "ready.idx").touch()
    check_run(load(tmp_path, changed(tmp_path, {"data.sources.chat.path": "ready"})), 2)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data.sources": NONE}, ["data.sources is missing", "name at least one"]),
        ({"data.tokenizer": NONE}, ["data.tokenizer is missing", "give the folder of a Hugging Face"]),
        ({"optimizer.optimizer": "sgd"}, ["optimizer.optimizer is sgd", "use adam"]),
        ({"data.tokenizer": "gone"}, ["data.tokenizer is", "gone, which does not exist; give a folder"]),
        (
            {"data.sources.math.path": "gone.jsonl"},
            [
                "source math: path is",
                "gone.jsonl, but there is no such file, folder or pattern, and no prepared",
                "gone.jsonl.idx",
            ],
        ),
        ({"data.sources.math.probe": "gone"}, ["source math: probe is", "no prepared", "gone.idx"]),
        (
            {"data.sources.chat.weight": 1},
            ["some sources have a weight, but not math, code; give all or none"],
        ),
        (
            {f"data.sources.{name}.weight": 0 for name in ("chat", "math", "code")},
            ["all sources have weight 0; at least one must be drawn from"],
        ),
        ({"training.train_iters": NONE}, ["training.train_iters is missing; give a whole number, 1 or more"]),
        ({"training.global_batch_size": NONE}, ["training.global_batch_size is missing", "1 or more"]),
        (
            {"parallel.tensor_model_parallel_size": 2},
            ["tensor_model_parallel_size is 2 without sequence_parallel", "add --sequence-parallel"],
        ),
        (
            {
                "model.qk_layernorm_full_width": True,
                "model.normalization": "LayerNorm",
                "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            },
            ["normalization LayerNorm", "tensor_model_parallel_size must be 1"],
        ),
        (
            {"parallel.virtual_pipeline_model_parallel_size": 2},
            ["virtual_pipeline_model_parallel_size is 2 with pipeline_model_parallel_size 1", "leave it out"],
        ),
        (
            {"parallel": INTERLEAVED, "model.num_layers": 6},
            ["num_layers is 6, 3 for each of 2 pipeline stages", "2 does not divide; use 1, 3"],
        ),
        (
            {"parallel": {**INTERLEAVED, "overlap_p2p_comm": False}, "model.num_layers": 4},
            ["interleaved pipeline of 2 stages without overlap_p2p_comm", "or use 3 stages or more"],
        ),
        (
            {"parallel": {**INTERLEAVED, "batch_p2p_comm": True}, "model.num_layers": 4},
            ["interleaved pipeline of 2 stages without overlap_p2p_comm", "leave out overlap_p2p_comm"],
        ),
        (
            {
                "parallel": {**INTERLEAVED, "batch_p2p_comm": True, "overlap_p2p_comm": True},
                "model.num_layers": 4,
            },
            ["overlap_p2p_comm and batch_p2p_comm are both true; leave out batch_p2p_comm"],
        ),
        ({"data.segment_multiple": 24}, ["seq_length is 64", "segment_multiple 24", "use 1, 2, 4, 8, 16"]),
        (
            {"model.moe_token_dispatcher_type": "flex", "parallel": {}},
            ["moe_token_dispatcher_type is flex", "nobody to send tokens to; use alltoall"],
        ),
        (
            {
                "model.moe_token_dispatcher_type": "flex",
                "model.moe_expert_capacity_factor": 1.0,
                "model.moe_pad_expert_input_to_capacity": True,
            },
            ["Megatron-Core refuses the model or its layout: ", "pad_expert_input_to_capacity"],
        ),
        (
            {"parallel.overlap_param_gather": True},
            ["overlap_param_gather needs overlap_grad_reduce; set that too, or leave out"],
        ),
        (
            {
                "parallel.overlap_param_gather": True,
                "parallel.overlap_grad_reduce": True,
                "parallel.use_distributed_optimizer": False,
            },
            ["overlap_param_gather needs use_distributed_optimizer"],
        ),
        (
            {"parallel.num_distributed_optimizer_instances": 2},
            ["num_distributed_optimizer_instances is 2", "the 1 ranks that hold the same experts; use 1"],
        ),
        (
            {
                "parallel.expert_model_parallel_size": 1,
                "parallel.use_distributed_optimizer": False,
                "parallel.num_distributed_optimizer_instances": 2,
            },
            ["num_distributed_optimizer_instances is 2 without use_distributed_optimizer"],
        ),
        (
            {"parallel.align_param_gather": True},
            ["align_param_gather needs overlap_param_gather and virtual_pipeline_model_parallel_size"],
        ),
        (
            {"optimizer.overlap_param_gather_with_optimizer_step": True},
            ["overlap_param_gather_with_optimizer_step needs overlap_param_gather and virtual_"],
        ),
        (
            {"parallel.overlap_p2p_comm": True},
            ["overlap_p2p_comm is true, but the pipeline is not interleaved; leave it out"],
        ),
        (
            {"parallel": INTERLEAVED, "model.num_layers": 4, "training.global_batch_size": 6},
            ["a batch of 6 is 3 micro-batches", "runs groups of 2", "use multiples of 4"],
        ),
        (
            {"parallel": INTERLEAVED, "model.num_layers": 4, "training.rampup_batch_size": [2, 2, 100]},
            ["a batch of 2 is 1 micro-batches", "runs groups of 2", "use multiples of 4"],
        ),
        (
            {
                "parallel": {**INTERLEAVED, "microbatch_group_size_per_vp_stage": 1},
                "model.num_layers": 4,
            },
            ["microbatch_group_size_per_vp_stage is 1; use pipeline_model_parallel_size (2) or more"],
        ),
        (
            {"model.moe_expert_capacity_factor": 1.0, "model.moe_router_fusion": True},
            ["moe_expert_capacity_factor with moe_router_fusion would count only", "leave out"],
        ),
        (
            {"model.freeze_router": True, **EXPERT_BIAS, "model.moe_router_bias_update_rate": 0.01},
            ["their expert bias too, but moe_router_bias_update_rate is 0.01; leave it out, or set it to 0"],
        ),
        (
            {"model.moe_expert_capacity_factor": 1.0, "mixing.load_mass": "probability"},
            ["load_mass is probability with moe_expert_capacity_factor", "use load_mass count"],
        ),
        (
            {"mixing.load_routers": "attention"},
            ["load_routers is attention, but the attention of this model has no experts", "leave it out"],
        ),
        (
            {"model.num_moe_experts": 6, "parallel.expert_model_parallel_size": 4},
            ["num_moe_experts is 6, which expert_model_parallel_size 4 does not divide; use 1, 2, 3, 6"],
        ),
        ({"model.num_moe_experts": None}, ["num_moe_experts is None, which expert_model_parallel_size 2"]),
        (
            {"parallel.expert_model_parallel_size": 4},
            ["2 ranks cannot hold expert TP x EP x PP = 4; start a multiple of 4 ranks"],
        ),
        (
            {"parallel": {"pipeline_model_parallel_size": 4}},
            ["2 ranks cannot hold TP x PP x CP = 4; start a multiple of 4 ranks"],
        ),
        (
            {"training.global_batch_size": 10},
            [
                "global_batch_size 10 is not a multiple of micro_batch_size 2 x data-parallel size 2 = 4",
                "use 8 or 12",
            ],
        ),
        ({"training.global_batch_size": 2}, ["global_batch_size 2 is not a multiple", "use 4"]),
        ({"model.num_attention_heads": 3}, ["num_attention_heads is 3, which num_query_groups 2 does not"]),
        ({"model.moe_router_topk": 9}, ["moe_router_topk is 9, but there are 8 experts; use 1 to 8"]),
        (
            {"model.moe_router_load_balancing_type": ["aux_loss", "auxloss"]},
            ["moe_router_load_balancing_type is ['aux_loss', 'auxloss']; it must be one of aux_loss"],
        ),
        ({"model.moe_router_load_balancing_type": "aux"}, ["moe_router_load_balancing_type is 'aux'"]),
        ({"model.moe_layer_freq": 0}, ["moe_layer_freq is 0; give 1 or more"]),
        ({"model.moe_layer_freq": [1]}, ["moe_layer_freq is [1]", "each of the 2 layers"]),
        ({"model.num_layers": 0}, ["model.num_layers is 0", "1 or more"]),
        (
            {"model.recompute_granularity": "full"},
            ["Megatron-Core refuses the model or its layout", "recompute_method"],
        ),
        (
            {f"data.sources.{name}.weight": n for n, name in enumerate(("chat", "math", "code"))}
            | {"mixing.strategy": "uniform"},
            ["mixing.strategy is uniform, but the sources have different weights; use fixed"],
        ),
        (
            {"model.num_moe_experts": None, "parallel": {}},
            ["mixing.strategy is gate-load, but the model is dense", "use strategy uniform or fixed"],
        ),
        (
            {"data.sources.code": NONE},
            ["gate-load with 2 sources; it needs 3", "add a source, or use strategy fixed"],
        ),
        (
            {"data.sources.math.probe": NONE},
            ["source math has no probe; add data.sources.math.probe", "or use signal train"],
        ),
        (
            {"mixing.strategy": "match-load", "mixing.match": "math", "mixing.signal": "train"},
            ["never draws its target", "use signal probe"],
        ),
        (
            {"mixing.strategy": "match-load", "mixing.match": "math", "mixing.weight_floor": 0.1},
            ["mixing.weight_floor would draw the target", "leave it out"],
        ),
        (
            {"mixing.strategy": "match-load"},
            ["match-load needs mixing.match (--match): the name of the source"],
        ),
        ({"mixing.sizes": {"chat": 1}}, ["mixing.sizes is given", "does not read it"]),
        (
            {"data.seq_length": 8192},
            ["seq_length is 8192, but the model allows 4096 positions; use 4096 or less"],
        ),
        (
            {
                "data.seq_length": 63,
                "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            },
            ["seq_length 63 is not a multiple of 2, which tensor-parallel size 2", "use 62 or 64"],
        ),
        (
            {"data.seq_length": 66, "parallel": {"context_parallel_size": 2}},
            ["seq_length 66 is not a multiple of 4, which", "context-parallel size 2 need; use 64 or 68"],
        ),
    ],
)
def test_a_run_that_cannot_work_is_refused(tmp_path, changes, parts):
    message = refused(tmp_path, changes)
    for part in parts:
        assert part in message


def test_prepare_needs_no_more_than_data(tmp_path):
    content = good_settings(tmp_path)
    check_data(load(tmp_path, {"data": content["data"]}))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    config = load(tmp_path, changed(tmp_path, {"model.vocab_size": 1000}))
    check_tokenizer(config, 1000)
    message = f"the tokenizer {tmp_path / 'tokenizer'} has 1001 tokens, but model.vocab_size is 1000"
    with pytest.raises(InputError, match=re.escape(message) + ".*set vocab_size to 1001 or more"):
        check_tokenizer(config, 1001)


@pytest.mark.parametrize(
    ("section", "name", "value", "need"),
    [
        ("model", "vocab_size", 0, "a positive number"),
        ("model", "make_vocab_size_divisible_by", 0, "a positive number"),
        ("model", "max_position_embeddings", -1, "a positive number"),
        ("model", "rotary_base", 0.0, "a positive number"),
        ("parallel", "distributed_timeout_minutes", 0.0, "a positive number"),
        ("parallel", "expert_model_parallel_size", -2, "1 or more"),
        ("data", "seq_length", 0, "a positive number"),
        ("data", "num_workers", -1, "0 or more"),
        ("data", "overlong", "keep", "one of drop, truncate, split, error"),
        ("parallel", "num_distributed_optimizer_instances", 0, "1 or more"),
        ("data", "template", "llama", "one of tokenizer, vicuna, chatml, plain"),
        ("mixing", "strategy", "doremi", "one of gate-load, "),
        ("mixing", "signal", "loss", "one of probe, train"),
        ("mixing", "interval", 0, "a positive number"),
        ("mixing", "probe_tokens", 0, "a positive number"),
        ("mixing", "probe_rows", "random", "one of fixed, rotating"),
        ("mixing", "load_tokens", "none", "one of all, trained"),
        ("mixing", "load_mass", "logits", "one of count, probability"),
        ("training", "train_iters", 0, "a positive number"),
        ("training", "micro_batch_size", 0, "a positive number"),
        ("training", "global_batch_size", -8, "a positive number"),
        ("training", "seed", -1, "0 or more"),
        ("optimizer", "lr", 0.0, "a positive number"),
        ("optimizer", "min_lr", -1.0, "from 0 to lr (2e-05)"),
        ("optimizer", "lr_decay_iters", 0, "a positive number"),
        ("optimizer", "lr_warmup_iters", -1, "0 or more"),
        ("optimizer", "weight_decay", -0.1, "0 or more"),
        ("optimizer", "lr_decay_style", "step", "one of linear, cosine, constant, inverse-square-root"),
        ("checkpoint", "save_interval", 0, "a positive number"),
        ("checkpoint", "keep_last", 0, "a positive number"),
        ("checkpoint", "on_save_error", "retry", "one of stop, continue"),
        ("logging", "log_interval", 0, "a positive number"),
    ],
)
def test_one_value_out_of_range_is_refused(tmp_path, section, name, value, need):
    with pytest.raises(InputError) as caught:
        load(tmp_path, {section: {name: value}})
    message = str(caught.value)
    assert f"{section}.{name} is {value!r}" in message and need in message


def test_weights_that_are_not_initialized_are_loaded(tmp_path):
    content = good_settings(tmp_path)
    content["parallel"]["perform_initialization"] = False
    with pytest.raises(InputError, match=r"no weights are loaded.*give load_hf or pretrained_checkpoint"):
        check_run(load(tmp_path, content), 2)
    content["checkpoint"] = {"pretrained_checkpoint": "checkpoints"}
    check_run(load(tmp_path, content), 2)
