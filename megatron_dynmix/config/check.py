"""What several settings must agree on, checked before a process group starts or a model is built."""

from __future__ import annotations

from pathlib import Path

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmix.config.megatron import moe_layers, optimizer_config, transformer_config
from megatron_dynmix.config.tree import RunConfig
from megatron_dynmix.errors import InputError

MIN_GATE_LOAD_SOURCES = 3


def check_run(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work.

    Args:
        config: the resolved configuration.
        world_size: ranks it is to run on.

    Raises:
        InputError: the first thing found, with what was given and what would work.

    """
    check_data(config)
    _check_required(config)
    _check_layout(config, world_size)
    transformer = transformer_config(config)
    optimizer_config(config)
    _check_model(transformer)
    _check_mixing(config, moe_layers(transformer))
    _check_lengths(config)


def check_data(config: RunConfig) -> None:
    """Refuse data settings that cannot work; `prepare` needs no more than these."""
    data = config.data
    if not data.sources:
        raise InputError("data.sources is missing; name at least one: {chat: {path: chat.jsonl}}")
    if data.tokenizer is None:
        raise InputError("data.tokenizer is missing; give the folder of a Hugging Face tokenizer")
    if not Path(data.tokenizer).is_dir():
        raise InputError(f"data.tokenizer is {data.tokenizer}, which is no folder")
    for name, source in data.sources.items():
        for key, path in (("path", source.path), ("probe", source.probe)):
            if path is not None and not Path(path).is_file() and not Path(f"{path}.idx").is_file():
                raise InputError(
                    f"source {name}: {key} is {path}, but there is no such file and no prepared {path}.idx"
                )
        if source.probe is not None and f"{name}.probe" in data.sources:
            raise InputError(
                f"source {name}.probe has the name that the probe of source {name} is kept under; rename it"
            )
    weights = [source.weight for source in data.sources.values()]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        without = [name for name, source in data.sources.items() if source.weight is None]
        raise InputError(f"some sources have a weight, but not {', '.join(without)}; give all or none")
    if given and sum(given) <= 0:
        raise InputError("all sources have weight 0; at least one must be drawn from")


def _check_required(config: RunConfig) -> None:
    for name in ("train_iters", "global_batch_size"):
        if getattr(config.training, name) is None:
            raise InputError(f"training.{name} is missing; give a whole number, 1 or more")
    warmup = config.optimizer.lr_warmup_iters
    decay = config.optimizer.lr_decay_iters or config.training.train_iters
    assert decay is not None, "checked above"
    if warmup >= decay:
        raise InputError(
            f"optimizer.lr_warmup_iters is {warmup}, but the learning rate is to have decayed after {decay} "
            f"iterations; use {decay - 1} or less"
        )


def _check_layout(config: RunConfig, world_size: int) -> None:
    size = config.parallel.size
    tp, pp = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
    cp, ep = size("context_parallel_size"), size("expert_model_parallel_size")
    etp = int(config.parallel.megatron.get("expert_tensor_parallel_size") or tp)
    if cp > 1:
        raise InputError(
            f"context_parallel_size is {cp}; only 1 is supported: use tensor parallelism instead"
        )
    if tp > 1 and not config.parallel.megatron.get("sequence_parallel"):
        raise InputError(
            f"tensor_model_parallel_size is {tp} without sequence_parallel, which MoE training needs: "
            "add --sequence-parallel"
        )
    if config.model.qk_layernorm_full_width and tp > 1:
        raise InputError(
            "qk_layernorm_full_width normalises over all heads: tensor_model_parallel_size must be 1"
        )
    if config.parallel.megatron.get("virtual_pipeline_model_parallel_size"):
        raise InputError("virtual_pipeline_model_parallel_size is not supported; leave it out")
    _check_recompute(config)
    experts = config.model.megatron.get("num_moe_experts")
    if ep > 1 and (not experts or experts % ep):
        raise InputError(
            f"num_moe_experts is {experts}, which expert_model_parallel_size {ep} does not divide; use "
            f"{_divisors(experts or 1, 64)}"
        )
    for product, what in ((tp * pp * cp, "TP x PP x CP"), (etp * ep * pp, "expert TP x EP x PP")):
        if world_size % product:
            raise InputError(
                f"{world_size} ranks cannot hold {what} = {product}; start a multiple of {product} ranks "
                "(--nproc-per-node), or make the groups smaller"
            )
    _check_stages(config, pp)
    _check_batch(config, world_size // (tp * pp * cp))


def _check_stages(config: RunConfig, pp: int) -> None:
    layers = int(config.model.megatron["num_layers"])
    uneven = any(name.startswith("num_layers_in_") for name in config.model.megatron)
    if pp > 1 and not uneven and layers % pp:
        raise InputError(
            f"num_layers is {layers}, which pipeline_model_parallel_size {pp} does not divide; use "
            f"{_divisors(layers, 64)} stages"
        )


def _check_batch(config: RunConfig, dp: int) -> None:
    training = config.training
    assert training.global_batch_size is not None
    step = training.micro_batch_size * dp
    if training.global_batch_size % step:
        below = training.global_batch_size // step * step
        raise InputError(
            f"global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x data-parallel size {dp} = {step}; use {below or step} or "
            f"{below + step}"
        )


def _check_recompute(config: RunConfig) -> None:
    model = config.model.megatron
    if model.get("recompute_granularity") == "full" and model.get("recompute_method") == "block":
        raise InputError(
            "recompute_method block hides the padding mask from the router of recomputed layers "
            "(Megatron-Core 0.16.1); use uniform"
        )


def _check_model(transformer: TransformerConfig) -> None:
    """What Megatron-Core would only find while it builds the model, or route into nothing."""
    heads, groups = transformer.num_attention_heads, transformer.num_query_groups or 1
    if heads % groups:
        raise InputError(
            f"num_attention_heads is {heads}, which num_query_groups {groups} does not divide; use "
            f"{_divisors(heads, 64)}"
        )
    experts, topk = transformer.num_moe_experts, transformer.moe_router_topk
    if experts and not 1 <= topk <= experts:
        raise InputError(f"moe_router_topk is {topk}, but there are {experts} experts; use 1 to {experts}")


def _check_mixing(config: RunConfig, layers: list[int]) -> None:
    mixing, sources = config.mixing, config.data.sources
    if mixing.strategy == "uniform" and len({source.weight for source in sources.values()}) > 1:
        raise InputError("mixing.strategy is uniform, but the sources have different weights; use fixed")
    if config.model.freeze_router and config.model.megatron.get("moe_router_enable_expert_bias"):
        raise InputError(
            "freeze_router keeps the routers as they are, but moe_router_enable_expert_bias goes on changing "
            "their choices; leave out one of them"
        )
    if mixing.strategy != "gate-load":
        return
    if not layers:
        raise InputError(
            "mixing.strategy is gate-load, but the model is dense: it has no gates to read; set "
            "num_moe_experts, or use strategy uniform or fixed"
        )
    if len(sources) < MIN_GATE_LOAD_SOURCES:
        raise InputError(
            f"mixing.strategy is gate-load with {len(sources)} source{'s' * (len(sources) > 1)}; it needs "
            f"{MIN_GATE_LOAD_SOURCES}: "
            "two are always equally far apart, so their weights never change; add a source, or use strategy "
            "fixed"
        )
    if mixing.signal == "probe":
        for name, source in sources.items():
            if source.probe is None:
                raise InputError(
                    f"mixing.signal is probe, but source {name} has no probe; add data.sources.{name}.probe "
                    "(held-out rows of the same kind), or use signal train"
                )


def _check_lengths(config: RunConfig) -> None:
    longest = config.model.max_position_embeddings
    assert longest is not None, "the preset gives one"
    if config.data.seq_length > longest:
        raise InputError(
            f"seq_length is {config.data.seq_length}, but the model allows {longest} positions; use "
            f"{longest} or less, or raise max_position_embeddings"
        )
    tp = config.parallel.size("tensor_model_parallel_size")
    if config.data.seq_length % tp:
        raise InputError(
            f"seq_length {config.data.seq_length} is not a multiple of tensor-parallel size {tp}"
        )


def check_tokenizer(config: RunConfig, tokenizer_size: int) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for.

    Args:
        config: the resolved configuration.
        tokenizer_size: tokens of the tokenizer, added ones included.

    """
    vocab_size = config.model.vocab_size
    assert vocab_size is not None, "the preset gives one"
    if tokenizer_size > vocab_size:
        raise InputError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer_size} tokens, but model.vocab_size is "
            f"{vocab_size}: its ids would have no embedding; set vocab_size to {tokenizer_size} or more"
        )


def _divisors(number: int, largest: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, min(number, largest) + 1) if number % divisor == 0)
