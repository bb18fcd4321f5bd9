"""What several settings must agree on, and files that must be there.

Checked before torch is imported; `megatron.check_with_megatron` asks Megatron-Core for the rest.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from megatron_dynmix.config import rotary
from megatron_dynmix.config.attention_experts import check_attention_experts
from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.idle import check_idle
from megatron_dynmix.config.megatron_fields import megatron_fields, model_settings, moe_layers
from megatron_dynmix.config.run_config import HUB, MixingConfig, ModelConfig, RunConfig, require
from megatron_dynmix.config.strategies import Chosen, resolved_options
from megatron_dynmix.errors import InputError


def check_data(config: RunConfig) -> None:
    """Refuse data settings that cannot work; `prepare` needs no more than these."""
    check_sources(config)
    check_files(config)


def check_sources(config: RunConfig) -> None:
    """Refuse sources that are not named or cannot be drawn from, whatever their files hold."""
    data = config.data
    if not data.sources:
        raise InputError("data.sources is missing; name at least one: {chat: {path: chat.jsonl}}")
    if data.tokenizer is None:
        raise InputError("data.tokenizer is missing; give the folder of a Hugging Face tokenizer")
    without = [name for name, source in data.sources.items() if source.weight is None]
    if 0 < len(without) < len(data.sources):
        raise InputError(f"some sources have a weight, but not {', '.join(without)}; give all or none")
    if not without and not any(source.weight for source in data.sources.values()):
        raise InputError("all sources have weight 0; at least one must be drawn from")


def check_files(config: RunConfig) -> None:
    """Refuse a tokenizer or a source that is not here."""
    tokenizer = str(config.data.tokenizer)
    if not tokenizer.startswith(HUB) and not Path(tokenizer).exists():
        raise InputError(
            f"data.tokenizer is {tokenizer}, which does not exist; give a folder, a .model or .tiktoken "
            f"file, or {HUB}ORGANISATION/NAME"
        )
    for name, source in config.data.sources.items():
        for key, path in (("path", source.path), ("probe", source.probe)):
            if path is None or Path(f"{path}.idx").is_file() or Path(path).exists():
                continue
            if not glob.glob(path, recursive=True):
                raise InputError(
                    f"source {name}: {key} is {path}, but there is no such file, folder or pattern, and no "
                    f"prepared {path}.idx"
                )


BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")
"""Kinds of load balancing; Megatron-Core takes any other word for none."""
BY_DISTANCE, MIN_SOURCES = ("gate-load", "inverse"), 3
"""Strategies whose scores are equal where there are two sources, and the sources that they need."""
RESOLVED_FROM = {
    "reference": "a JSON file {source: loss of a reference model}",
    "target": "a JSON file {source: loss that is aimed at}",
    "weights_from": "the directory of a run with weight updates, or a JSON file {source: weight}",
    "embeddings": "a JSON or .npz file {source: vector}",
    "schedule": "[[iteration, {source: weight}], ...]",
    "sizes": "{source: size}",
    "match": "the name of the source whose load is to be matched",
}


def check_run(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work on so many ranks: the first thing found, and what would work."""
    check_data(config)
    check_settings(config, world_size)
    check_idle(config)


def check_settings(config: RunConfig, world_size: int) -> None:
    """Check a run without a look at the disk: the files may be on another machine."""
    check_sources(config)
    _check_length(config)
    _check_layout(config, world_size)
    _check_wsd(config)
    _check_model(config)
    check_attention_experts(config)
    _check_router(config)
    _check_capacity(config)
    _check_mixing(config)
    _check_lengths(config)


def _check_length(config: RunConfig) -> None:
    for name in ("train_iters", "global_batch_size"):
        if getattr(config.training, name) is None:
            raise InputError(f"training.{name} is missing; give a whole number, 1 or more")
    optimizer = config.optimizer
    warmup, decay = optimizer.lr_warmup_iters, optimizer.lr_decay_iters or config.training.train_iters
    assert decay is not None, "checked above"
    if warmup >= decay:
        raise InputError(
            f"optimizer.lr_warmup_iters is {warmup}, but the learning rate is to have decayed after {decay} "
            f"iterations; use {decay - 1} or less"
        )
    if (name := optimizer.megatron.get("optimizer", "adam")) != "adam":
        raise InputError(f"optimizer.optimizer is {name}, whose state checkpoints do not hold; use adam")


def _check_wsd(config: RunConfig) -> None:
    optimizer, wsd = config.optimizer, ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style")
    iters, samples, _ = given = [getattr(optimizer, name) for name in wsd]
    if optimizer.lr_decay_style != "WSD":
        for name in (name for name, value in zip(wsd, given, strict=True) if value is not None):
            raise InputError(
                f"optimizer.{name} is given, but lr_decay_style is {optimizer.lr_decay_style}; leave it out, "
                "or set lr_decay_style to WSD"
            )
        return
    if (iters is None) == (samples is None):
        raise InputError("lr_decay_style is WSD; give either lr_wsd_decay_iters or lr_wsd_decay_samples")
    warmup, decay = optimizer.lr_warmup_iters, optimizer.lr_decay_iters or config.training.train_iters
    assert decay is not None, "checked before"
    schedule = BatchSchedule.of(config)
    most = decay - warmup if iters else schedule.samples_at(decay) - schedule.samples_at(warmup)
    if (iters or samples) > most:
        raise InputError(
            f"optimizer.{wsd[0] if iters else wsd[1]} is {iters or samples}, but only {most} are left "
            f"between the warm-up and iteration {decay}; use {most} or less"
        )


def _check_layout(config: RunConfig, world_size: int) -> None:
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
    _check_divides(f"num_moe_experts is {experts}", experts or 1, "expert_model_parallel_size", ep)
    for product, what in ((tp * pp * cp, "TP x PP x CP"), (etp * ep * pp, "expert TP x EP x PP")):
        if world_size % product:
            raise InputError(
                f"{world_size} ranks cannot hold {what} = {product}; start a multiple of {product} ranks "
                "(--nproc-per-node), or make the groups smaller"
            )
    _check_stages(config, pp)
    _check_gathering(config)
    _check_instances(config, world_size // (tp * pp), world_size // (etp * ep * pp))
    _check_batch(config, pp, world_size // (tp * pp * cp))


def _check_stages(config: RunConfig, pp: int) -> None:
    layers = int(config.model.megatron["num_layers"])
    uneven = any(name.startswith("num_layers_in_") for name in config.model.megatron)
    if not uneven:
        _check_divides(f"num_layers is {layers}", layers, "pipeline_model_parallel_size", pp)
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
        _check_divides(said, each, "virtual_pipeline_model_parallel_size", virtual)
    if overlap and config.parallel.megatron.get("batch_p2p_comm"):
        raise InputError("overlap_p2p_comm and batch_p2p_comm are both true; leave out batch_p2p_comm")
    if pp == 2 and not overlap:
        raise InputError(
            "an interleaved pipeline of 2 stages without overlap_p2p_comm would mix their messages; leave "
            "out overlap_p2p_comm and batch_p2p_comm, or use 3 stages or more"
        )


def _check_gathering(config: RunConfig) -> None:
    """Refuse ways to gather parameters that would gather nothing while the model computes."""
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


def _check_divides(said: str, number: int, name: str, size: int) -> None:
    if number % size:
        divisors = (str(divisor) for divisor in range(1, min(number, 64) + 1) if number % divisor == 0)
        raise InputError(f"{said}, which {name} {size} does not divide; use {', '.join(divisors)}")


def _check_batch(config: RunConfig, pp: int, dp: int) -> None:
    training, batch = config.training, config.training.global_batch_size
    assert batch is not None, "checked above"
    step = training.micro_batch_size * dp
    sizes = f"micro_batch_size {training.micro_batch_size} x data-parallel size {dp}"
    if training.step_batch_size_schedule is not None:
        _check_steps(config, step, sizes)
    elif batch % step:
        below = batch // step * step
        raise InputError(
            f"global_batch_size {batch} is not a multiple of {sizes} = {step}; use "
            f"{f'{below} or ' if below else ''}{below + step}"
        )
    start, increment, _ = training.rampup_batch_size or (batch, step, 0)
    given = f"rampup_batch_size cannot go from {start} in steps of {increment} to global_batch_size {batch}"
    if training.rampup_batch_size and (start >= batch or (batch - start) % increment):
        raise InputError(f"{given}; start below {batch}, a multiple of the step away from it")
    if start % step or increment % step:
        raise InputError(f"{given} with {sizes}; make start and step multiples of {step}")
    if config.parallel.virtual_stages:
        _check_groups(config, pp, step, [size for _, size in BatchSchedule.of(config).steps])


def _check_steps(config: RunConfig, step: int, sizes: str) -> None:
    """Refuse batches that the ranks cannot share, and two that begin in the same row."""
    text = config.training.step_batch_size_schedule
    if config.training.rampup_batch_size is not None:
        raise InputError("rampup_batch_size and step_batch_size_schedule are both given; leave out one")
    steps = BatchSchedule.of(config).steps
    if len(dict(steps)) < len(steps):
        raise InputError(
            f"two thresholds of step_batch_size_schedule {text!r} fall into the same row of seq_length "
            f"{config.data.seq_length} tokens; move them apart, or leave one out"
        )
    for _, size in steps:
        if size % step:
            raise InputError(
                f"step_batch_size_schedule {text!r} has batch size {size}, not a multiple of {sizes} = "
                f"{step}; use multiples of it, and leave out steps that the run is past"
            )


def _check_groups(config: RunConfig, pp: int, step: int, batch_sizes: Sequence[int]) -> None:
    """Refuse batches that an interleaved pipeline cannot run in groups.

    The last group may be shorter than the others, but must fill the pipeline.
    """
    group = int(config.parallel.megatron.get("microbatch_group_size_per_vp_stage") or pp)
    if group < pp:
        raise InputError(
            f"microbatch_group_size_per_vp_stage is {group}; use pipeline_model_parallel_size ({pp}) or more"
        )
    for batch_size in batch_sizes:
        micro_batches = batch_size // step
        if micro_batches < group or 0 < micro_batches % group < pp:
            raise InputError(
                f"a batch of {batch_size} is {micro_batches} micro-batches, but an interleaved pipeline runs "
                f"groups of {group} (the last one may be shorter, but not than {pp}); use multiples of "
                f"{step * group}"
            )


def _check_model(config: RunConfig) -> None:
    """Refuse what Megatron-Core would only find while it builds the model, or route into nothing."""
    model = model_settings(config)
    require(model.num_layers >= 1, "model.num_layers", model.num_layers, "1 or more")
    latent = megatron_fields()["MLATransformerConfig"].keys() - {*rotary.SETTINGS}
    given = sorted(latent & config.model.megatron.keys())
    given += ["latent_layernorm_epsilon"] if config.model.latent_layernorm_epsilon is not None else []
    if not model.multi_latent_attention and given:
        raise InputError(
            f"{', '.join(given)}: only multi-latent attention has that; set multi_latent_attention, or leave "
            "it out"
        )
    _check_rotary(config.model, model)
    loads = config.model.load_hf or config.checkpoint.pretrained_checkpoint
    if config.parallel.megatron.get("perform_initialization") is False and not loads:
        raise InputError(
            "perform_initialization is false, but no weights are loaded: they would be any numbers; "
            "leave it out, or give load_hf or pretrained_checkpoint"
        )
    heads, groups = model.num_attention_heads, model.num_query_groups or 1
    _check_divides(f"num_attention_heads is {heads}", heads, "num_query_groups", groups)
    experts, topk = model.num_moe_experts, model.moe_router_topk
    if experts and not 1 <= topk <= experts:
        raise InputError(f"moe_router_topk is {topk}, but there are {experts} experts; use 1 to {experts}")


def _check_rotary(given: ModelConfig, model: SimpleNamespace) -> None:
    """Refuse settings of the rotary embedding that would be left out, or computed otherwise."""
    rope, yarn = given.megatron.get("rope_type"), rotary.yarn_of(given.megatron)
    require(rope in (None, "rope", "yarn"), "model.rope_type", rope, "rope or yarn")
    latent, factor = model.multi_latent_attention, given.rotary_seq_len_interpolation_factor
    named = [name for name in rotary.YARN if name in given.megatron]
    if not given.yarn_correction_range_round_to_int:
        named += [rotary.TRUNCATED]
    if named and yarn is None and not latent:
        raise InputError(f"{', '.join(named)}: only YaRN has that; set rope_type to yarn, or leave it out")
    if factor is not None and (latent or yarn is not None):
        raise InputError(
            f"{rotary.INTERPOLATED} is {factor}, and the rotary embedding is that of "
            f"{'latent attention' if latent else 'YaRN'}, which has a scale of its own; leave it out"
        )
    if latent and rotary.TRUNCATED in named:
        raise InputError(f"{rotary.TRUNCATED} is false, but true in latent attention; leave it out")
    if yarn is None or latent:
        return
    needed = ("rotary_scaling_factor", "original_max_position_embeddings")
    if missing := [name for name in needed if name not in named]:
        raise InputError(f"rope_type is yarn and {', '.join(missing)} not given; set what the model has")
    for name in ("apply_rope_fusion", "rotary_interleaved"):
        if getattr(model, name):
            raise InputError(
                f"{name} is true and rope_type yarn: Megatron-Core would leave out YaRN's scale of attention "
                "or stop; set it to false"
            )


def _check_router(config: RunConfig) -> None:
    """Refuse routers and frozen weights that the rest of the model does not fit."""
    model, megatron = config.model, config.model.megatron
    if model.router_network != "linear" and not megatron.get("num_moe_experts"):
        raise InputError(
            f"router_network is {model.router_network}, but the model is dense: it has no routers; leave it "
            "out"
        )
    if (model.router_network == "gelu") is (model.router_width is None):
        raise InputError(
            f"router_width is {model.router_width} with router_network {model.router_network}; a router of "
            "gelu has a width between its matrices, and no other has"
        )
    if model.router_noise is not None and model.router_network != "mlp":
        raise InputError(
            f"router_noise is {model.router_noise} with router_network {model.router_network}, which has no "
            "weights for it; leave out router_noise, or set router_network to mlp"
        )
    kinds = megatron.get("moe_router_load_balancing_type", "aux_loss")
    known = all(kind in BALANCING for kind in (kinds if isinstance(kinds, list) else [kinds]))
    require(known, "model.moe_router_load_balancing_type", kinds, f"one of {', '.join(BALANCING)}")
    rate = megatron.get("moe_router_bias_update_rate")
    if model.freeze_router and megatron.get("moe_router_enable_expert_bias") and rate:
        raise InputError(
            f"freeze_router keeps the routers as they are, their expert bias too, but "
            f"moe_router_bias_update_rate is {rate}; leave it out, or set it to 0"
        )
    if not model.freeze_expert_gate:
        return
    if not (megatron.get("num_moe_experts") and megatron.get("gated_linear_unit")):
        raise InputError(
            "freeze_expert_gate is true, but the model has no experts with a gate projection; leave it out"
        )
    if config.optimizer.weight_decay:
        raise InputError(
            f"freeze_expert_gate keeps the experts' gate projections as they are, but weight_decay "
            f"{config.optimizer.weight_decay} would shrink them; set weight_decay to 0"
        )
    if megatron.get("moe_use_legacy_grouped_gemm"):
        raise InputError(
            "freeze_expert_gate with moe_use_legacy_grouped_gemm, which keeps all experts in one matrix, is "
            "not supported; leave out moe_use_legacy_grouped_gemm"
        )


def _check_capacity(config: RunConfig) -> None:
    model = config.model.megatron
    if model.get("moe_expert_capacity_factor") is None:
        return
    if model.get("moe_router_fusion"):
        raise InputError(
            "moe_expert_capacity_factor with moe_router_fusion would count only the tokens that were not "
            "dropped: the fused router does not tell what it chose; leave out moe_router_fusion"
        )
    if config.mixing.load_mass == "probability":
        raise InputError(
            "mixing.load_mass is probability with moe_expert_capacity_factor: the probabilities of dropped "
            "tokens are not known; use load_mass count, or leave out moe_expert_capacity_factor"
        )


def _check_mixing(config: RunConfig) -> None:
    mixing, sources, layers = config.mixing, config.data.sources, moe_layers(model_settings(config))
    if mixing.strategy == "uniform" and len({source.weight for source in sources.values()}) > 1:
        raise InputError("mixing.strategy is uniform, but the sources have different weights; use fixed")
    unprobed = [name for name in sources if name not in config.data.probed]
    check_strategies(mixing, list(sources), layers, unprobed)


def check_strategies(
    mixing: MixingConfig, sources: Sequence[str], moe_layers: list[int] | None, unprobed: Sequence[str] = ()
) -> None:
    """Refuse strategies that cannot work with these sources and layers, None if those are not known yet.

    The `unprobed` sources have no held-out rows.
    """
    _check_signal(mixing, mixing.chosen, "mixing.strategy is", sources, moe_layers, unprobed)
    for shadow in mixing.shadows:
        _check_signal(mixing, shadow, "mixing.shadow has", sources, moe_layers, unprobed)
    _check_resolved(mixing)


def _check_signal(
    mixing: MixingConfig,
    chosen: Chosen,
    what: str,
    sources: Sequence[str],
    layers: list[int] | None,
    unprobed: Sequence[str],
) -> None:
    """Refuse a strategy that reads what cannot be measured."""
    needs_gate_load, needs_loss = chosen.needs
    if needs_gate_load and layers == []:
        raise InputError(
            f"{what} {chosen.label}, but the model is dense: it has no gates to read; set "
            "num_moe_experts, or use strategy uniform or fixed"
        )
    if chosen.strategy in BY_DISTANCE and len(sources) < MIN_SOURCES:
        raise InputError(
            f"{what} {chosen.label} with {len(sources)} source{'s' * (len(sources) > 1)}; it needs "
            f"{MIN_SOURCES}: two are always equally far apart, so their weights never change; add a source, "
            "or use strategy fixed"
        )
    if chosen.strategy == "match-load":
        _check_target(mixing)
    if (needs_gate_load or needs_loss) and mixing.signal == "probe" and unprobed:
        raise InputError(
            f"{what} {chosen.label} and mixing.signal probe, but source {unprobed[0]} has no probe; add "
            f"data.sources.{unprobed[0]}.probe (held-out rows of the same kind), hold some out with "
            "data.probe (--probe), or use signal train"
        )


def _check_target(mixing: MixingConfig) -> None:
    """Refuse what would draw the target of match-load, or leave it unmeasured."""
    if mixing.signal == "train":
        raise InputError(
            "match-load never draws its target, so mixing.signal train would not measure it; use signal probe"
        )
    for setting in ("weight_floor", "min_entropy", "prior_pull"):
        if mixing.strategy == "match-load" and getattr(mixing, setting):
            raise InputError(
                f"mixing.{setting} would draw the target of match-load, which is there to be measured; leave "
                "it out"
            )


def _check_resolved(mixing: MixingConfig) -> None:
    """Refuse a setting that a strategy needs and lacks, and one that no strategy reads."""
    used: set[str] = set()
    for chosen in mixing.asked:
        settings = resolved_options(chosen.strategy)
        used |= settings.keys()
        for setting, required in settings.items():
            if required and getattr(mixing, setting) is None:
                raise InputError(f"strategy {chosen.label} needs mixing.{setting}: {RESOLVED_FROM[setting]}")
    for setting, what in RESOLVED_FROM.items():
        if getattr(mixing, setting) is not None and setting not in used:
            raise InputError(
                f"mixing.{setting} is given ({what}), but strategy {mixing.strategy} does not read it; leave "
                "it out"
            )


def _check_lengths(config: RunConfig) -> None:
    longest = config.model.max_position_embeddings
    assert longest is not None, "the preset gives one"
    if config.data.seq_length > longest:
        raise InputError(
            f"seq_length is {config.data.seq_length}, but the model allows {longest} positions; use "
            f"{longest} or less, or raise max_position_embeddings"
        )
    _check_divides(
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


def check_tokenizer(config: RunConfig, tokenizer_size: int) -> None:
    """Refuse a tokenizer with more tokens, added ones included, than the embedding has rows."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None, "the preset gives one"
    if tokenizer_size > vocab_size:
        raise InputError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer_size} tokens, but model.vocab_size is "
            f"{vocab_size}: its ids would have no embedding; set vocab_size to {tokenizer_size} or more"
        )
