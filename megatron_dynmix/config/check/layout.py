"""How ranks make groups, and what a row must divide into."""

from __future__ import annotations

import math

from megatron_dynmix.config.check.batch import check_batch
from megatron_dynmix.config.megatron_fields import model_settings
from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError


def check_layout(config: RunConfig, world_size: int) -> None:
    """Refuse groups that so many ranks cannot make, and what does not go with them."""
    size = config.parallel.size
    tp, pp = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
    cp, ep = size("context_parallel_size"), size("expert_model_parallel_size")
    etp = int(config.parallel.megatron.get("expert_tensor_parallel_size") or tp)
    if tp > 1 and not config.parallel.megatron.get("sequence_parallel"):
        raise InputError(
            f"tensor_model_parallel_size is {tp} without sequence_parallel, which MoE training needs: "
            "add --sequence-parallel"
        )
    if config.model.megatron.get("window_size") is not None and cp > 1:
        raise InputError(
            f"window_size is given and context_parallel_size is {cp}: a mask does not tell how far apart two "
            "positions are there; set context_parallel_size to 1"
        )
    normalization = model_settings(config).normalization
    if config.model.qk_layernorm_full_width and tp > 1 and normalization != "RMSNorm":
        raise InputError(
            f"qk_layernorm_full_width is true and normalization {normalization}: tensor-parallel "
            "ranks sum the squares of their heads, which RMSNorm asks for; tensor_model_parallel_size must "
            "be 1"
        )
    if config.model.megatron.get("moe_token_dispatcher_type") == "flex" and etp * ep == 1:
        raise InputError(
            "moe_token_dispatcher_type is flex without expert or expert-tensor parallelism: there is nobody "
            "to send tokens to; use alltoall"
        )
    experts = config.model.megatron.get("num_moe_experts")
    check_divides(f"num_moe_experts is {experts}", experts or 1, "expert_model_parallel_size", ep)
    for product, what in ((tp * pp * cp, "TP x PP x CP"), (etp * ep * pp, "expert TP x EP x PP")):
        if world_size % product:
            raise InputError(
                f"{world_size} ranks cannot hold {what} = {product}; start a multiple of {product} ranks "
                "(--nproc-per-node), or make the groups smaller"
            )
    _check_stages(config, pp)
    _check_gathering(config, ep > 1 or etp != tp)
    _check_instances(config, world_size // (tp * pp), world_size // (etp * ep * pp))
    check_batch(config, pp, world_size // (tp * pp * cp))


def _check_stages(config: RunConfig, pp: int) -> None:
    layers = int(config.model.megatron["num_layers"])
    uneven = any(name.startswith("num_layers_in_") for name in config.model.megatron)
    if not uneven:
        check_divides(f"num_layers is {layers}", layers, "pipeline_model_parallel_size", pp)
    virtual, overlap = config.parallel.virtual_stages, config.parallel.overlap_p2p_comm
    if not virtual:
        if overlap:
            raise InputError(
                "overlap_p2p_comm is true, but the pipeline is not interleaved; leave it out, or set "
                "virtual_pipeline_model_parallel_size"
            )
        return
    if pp == 1 or virtual == 1:
        raise InputError(
            f"virtual_pipeline_model_parallel_size is {virtual} with pipeline_model_parallel_size {pp}; an "
            "interleaved pipeline has 2 or more of both: leave it out, or raise them"
        )
    if not uneven:
        each = layers // pp
        said = f"num_layers is {layers}, {each} for each of {pp} pipeline stages"
        check_divides(said, each, "virtual_pipeline_model_parallel_size", virtual)
    if overlap and config.parallel.megatron.get("batch_p2p_comm"):
        raise InputError("overlap_p2p_comm and batch_p2p_comm are both true; leave out batch_p2p_comm")
    if pp == 2 and not overlap:
        raise InputError(
            "an interleaved pipeline of 2 stages without overlap_p2p_comm would mix their messages; leave "
            "out overlap_p2p_comm and batch_p2p_comm, or use 3 stages or more"
        )


def _check_gathering(config: RunConfig, experts_apart: bool) -> None:
    """Refuse ways to gather parameters that would gather nothing while the model computes, or too early.

    `experts_apart`: other ranks hold the same experts than the same other parameters, so that experts have
    buffers and an optimizer of their own.
    """
    parallel = config.parallel
    has = {
        **parallel.megatron,
        **config.optimizer.megatron,
        "use_distributed_optimizer": parallel.use_distributed_optimizer,
        "virtual_pipeline_model_parallel_size": parallel.virtual_stages,
    }
    interleaved = ("overlap_param_gather", "virtual_pipeline_model_parallel_size")
    for name, needed in {
        "overlap_param_gather": ("use_distributed_optimizer", "overlap_grad_reduce"),
        "align_param_gather": interleaved,
        "overlap_param_gather_with_optimizer_step": interleaved,
    }.items():
        if has.get(name) and (missing := [need for need in needed if not has.get(need)]):
            raise InputError(f"{name} needs {' and '.join(missing)}; set that too, or leave out {name}")
    if experts_apart and has.get("overlap_param_gather_with_optimizer_step"):
        # It gathers all of the first chunk after the step of its dense part; experts are stepped last.
        raise InputError(
            "overlap_param_gather_with_optimizer_step is true with experts divided otherwise than the rest: "
            "Megatron-Core would gather the first chunk's experts before they are stepped; leave it out, or "
            "set expert_model_parallel_size to 1 and leave out expert_tensor_parallel_size"
        )


def _check_instances(config: RunConfig, replicas: int, expert_replicas: int) -> None:
    """Refuse instances of the distributed optimizer that the ranks with the same parameters cannot share."""
    instances = config.parallel.size("num_distributed_optimizer_instances")
    said = f"num_distributed_optimizer_instances is {instances}"
    if instances > 1 and not config.parallel.use_distributed_optimizer:
        raise InputError(f"{said} without use_distributed_optimizer, whose state they share; leave it out")
    for ranks, what in ((replicas, "parameters"), (expert_replicas, "experts")):
        if ranks % instances:
            divisors = (
                str(number)
                for number in range(1, ranks + 1)
                if math.gcd(replicas, expert_replicas) % number == 0
            )
            raise InputError(
                f"{said}, which does not divide the {ranks} ranks that hold the same {what}; use "
                f"{', '.join(divisors)}"
            )


def check_lengths(config: RunConfig) -> None:
    """Refuse rows that are too long for the model, or that ranks cannot divide."""
    longest = config.model.max_position_embeddings
    assert longest is not None, "the preset gives one"
    if config.data.seq_length > longest:
        raise InputError(
            f"seq_length is {config.data.seq_length}, but the model allows {longest} positions; use "
            f"{longest} or less, or raise max_position_embeddings"
        )
    check_divides(
        f"seq_length is {config.data.seq_length}",
        config.data.seq_length,
        "segment_multiple",
        config.data.segment_multiple,
    )
    tp = config.parallel.size("tensor_model_parallel_size")
    cp = config.parallel.size("context_parallel_size")
    # Context-parallel ranks hold two parts of a row each, and their tensor-parallel ranks a slice of both.
    multiple = cp * math.lcm(2, tp) if cp > 1 else tp
    if config.data.seq_length % multiple:
        below = config.data.seq_length // multiple * multiple
        near = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise InputError(
            f"seq_length {config.data.seq_length} is not a multiple of {multiple}, which tensor-parallel "
            f"size {tp} and context-parallel size {cp} need; use {near}"
        )


def check_divides(said: str, number: int, name: str, size: int) -> None:
    """Refuse a size that does not divide the number that `said` tells of, with those that do."""
    if number % size:
        divisors = (str(divisor) for divisor in range(1, min(number, 64) + 1) if number % divisor == 0)
        raise InputError(f"{said}, which {name} {size} does not divide; use {', '.join(divisors)}")
