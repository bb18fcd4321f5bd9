"""One rank of a run: join the job, build everything, train."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)

from megatron_dynmix import platform
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.check import check_run, check_tokenizer
from megatron_dynmix.config.load import to_yaml
from megatron_dynmix.config.megatron import moe_layers, transformer_config
from megatron_dynmix.data.loader import BlendLoader
from megatron_dynmix.data.prepare import SourceReport
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.controller import MixingController
from megatron_dynmix.mixing.load import select_layers
from megatron_dynmix.moe.counter import GateLoadCounter
from megatron_dynmix.moe.router import attach_counter
from megatron_dynmix.monitor.logline import loaded_line, loading_line
from megatron_dynmix.monitor.metrics import MetricsWriter
from megatron_dynmix.training.checkpoint import Checkpointer, write_atomically
from megatron_dynmix.training.model import build_model
from megatron_dynmix.training.optimizer import build_optimizer
from megatron_dynmix.training.probe import Probe
from megatron_dynmix.training.report import report_start
from megatron_dynmix.training.resume import (
    Resume,
    check_pretrained,
    check_resume,
    check_run_dir,
    has_checkpoint,
    identity,
)
from megatron_dynmix.training.reweighting import Reweighting, build_strategy
from megatron_dynmix.training.sources import build_blend, build_rows, initial_weights, prepare_sources
from megatron_dynmix.training.step import PassRunner
from megatron_dynmix.training.trainer import LogInterval, Progress, Trainer, seed_iteration


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    reports: list[SourceReport]
    """What became of each input's examples when it was prepared: the sources', then their probes'."""
    train: list[PackedRows]
    probe: list[PackedRows]


def check_before_start(config: RunConfig, world_size: int) -> Tokenizer:
    """Everything that can be refused without a process group or a model; returns the tokenizer.

    Raises:
        InputError: what is wrong.

    """
    check_run(config, world_size)
    try:
        build_strategy(config.mixing)
        if config.mixing.strategy == "gate-load":
            select_layers(config.mixing.layers, len(moe_layers(transformer_config(config))))
    except ValueError as error:
        raise InputError(f"mixing: {error}") from None
    tokenizer = load_tokenizer(Path(config.data.tokenizer or ""))
    check_tokenizer(config, tokenizer.vocab_size)
    check_pretrained(config)
    _check_transformer_engine(config)
    return tokenizer


def _check_transformer_engine(config: RunConfig) -> None:
    """Transformer Engine takes all rows of a micro-batch as one sequence, in 16 bits."""
    if not platform.start().transformer_engine:
        return
    if not config.training.bf16:
        raise InputError("Transformer Engine attends to packed rows in bf16 only; add --bf16")
    if "seq_aux_loss" in str(config.model.megatron.get("moe_router_load_balancing_type")):
        raise InputError(
            "moe_router_load_balancing_type seq_aux_loss would balance over a whole micro-batch: with "
            "Transformer Engine its rows are one sequence; use aux_loss or global_aux_loss"
        )


def train(config: RunConfig, run_dir: Path, *, resume: Resume = "no") -> Trainer:
    """Train on this rank; every rank of the job calls it with the same arguments.

    Args:
        config: the resolved configuration.
        run_dir: where everything is written.
        resume: `no`, `must` or `auto`.

    Returns:
        The trainer after the last iteration.

    Raises:
        InputError: refused before the job is joined.
        TrainingStopped: the run ended early; its last good state is kept.

    """
    here = platform.start()
    tokenizer = check_before_start(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_run_dir(run_dir, resume)
    # Before the ranks wait for one another: nothing can be refused after that, and preparing takes its time.
    data = read_data(config, tokenizer)
    changes = check_resume(config, data.reports, run_dir, resume)
    join_job(config)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        report_start(config, data, run_dir, changes)
    trainer = build_trainer(config, run_dir, data, here, resume=resume)
    trainer.fit()
    return trainer


def join_job(config: RunConfig) -> None:
    """Process groups, micro-batch arithmetic and one thread per rank."""
    torch.set_num_threads(1)  # ranks share the cores; more threads would also change the order of sums
    platform.init_process_group(config.parallel.distributed_timeout_minutes)
    size = config.parallel.size
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=size("tensor_model_parallel_size"),
            pipeline_model_parallel_size=size("pipeline_model_parallel_size"),
            expert_model_parallel_size=size("expert_model_parallel_size"),
            expert_tensor_parallel_size=config.parallel.megatron.get("expert_tensor_parallel_size"),
            distributed_timeout_minutes=math.ceil(config.parallel.distributed_timeout_minutes),
        )
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(
        rank=torch.distributed.get_rank(),
        rampup_batch_size=None,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def read_data(config: RunConfig, tokenizer: Tokenizer) -> Data:
    """Prepare what is not prepared, and pack; both are kept on disk and found again.

    Raises:
        InputError: data that cannot be used.

    """
    reports = list(prepare_sources(config, tokenizer))
    probing = config.mixing.strategy == "gate-load" and config.mixing.signal == "probe"
    return Data(
        reports=reports,
        train=build_rows(config, tokenizer, probe=False),
        probe=build_rows(config, tokenizer, probe=True) if probing else [],
    )


def build_trainer(
    config: RunConfig, run_dir: Path, data: Data, here: platform.Platform, *, resume: Resume
) -> Trainer:
    """Model, optimizer, blend, probe and writers of this rank, at the state that `resume` asks for."""
    rank0 = torch.distributed.get_rank() == 0
    seed_iteration(config.training.seed, -1)  # of the time before the first iteration
    run = _build_runner(config, len(data.train), here)
    optimizer, scheduler = build_optimizer(config, run.model)
    blend = build_blend(config, data.train)
    controller = MixingController(
        list(config.data.sources), initial_weights(config), build_strategy(config.mixing)
    )
    batching = {
        "micro_batch_size": config.training.micro_batch_size,
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }
    probe = None
    if data.probe:
        probe = Probe(
            data.probe,
            probe_tokens=config.mixing.probe_tokens,
            seq_length=config.data.seq_length,
            **batching,
        )
    reweighting = Reweighting(config.mixing, controller, blend, run, probe)
    checkpointer = Checkpointer(
        directory=run_dir / "checkpoints", model=run.model, optimizer=optimizer, scheduler=scheduler
    )
    say = _say if rank0 else _silent
    resuming = resume != "no" and has_checkpoint(run_dir)
    progress, interval = _restore(config, checkpointer, reweighting, say, resuming=resuming)
    # A run that died before its first checkpoint begins again: its records are those of no state.
    resume_iteration = None if resume == "no" else progress.iteration
    return Trainer(
        config=config,
        run=run,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=BlendLoader(
            blend,
            num_workers=config.data.num_workers,
            pin_memory=here.pin_memory,
            **batching,
        ),
        reweighting=reweighting,
        checkpointer=checkpointer,
        writer=_open_writer(config, run_dir, resume_iteration) if rank0 else None,
        identity=identity(config, data.reports),
        progress=progress,
        interval=interval,
        say=say,
    )


def _build_runner(config: RunConfig, num_sources: int, here: platform.Platform) -> PassRunner:
    """The model, and the counter that its routers write into."""
    transformer = transformer_config(config)
    model = build_model(config, transformer, here)
    layers = moe_layers(transformer)
    counter = GateLoadCounter(num_sources, len(layers), transformer.num_moe_experts or 1, here.device)
    attach_counter([model], counter, layers)
    return PassRunner(
        model=model,
        platform=here,
        counter=counter,
        seq_length=config.data.seq_length,
        sequence_parallel=transformer.sequence_parallel,
    )


def _open_writer(config: RunConfig, run_dir: Path, resume_iteration: int | None) -> MetricsWriter:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", to_yaml(config))
    writer = MetricsWriter(run_dir, tuple(config.data.sources), resume_iteration=resume_iteration)
    writer.text("config", f"```yaml\n{to_yaml(config)}```")
    return writer


def _restore(
    config: RunConfig,
    checkpointer: Checkpointer,
    reweighting: Reweighting,
    say: Callable[[str], None],
    *,
    resuming: bool,
) -> tuple[Progress, LogInterval]:
    """Where the run starts: at its checkpoint, at another run's weights, or at nothing."""
    if resuming:
        state = checkpointer.load()
        reweighting.load_state_dict(state["mixing"])
        size = config.parallel.size
        tp, pp = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
        say(loading_line(state["iteration"], checkpointer.directory))
        say(loaded_line(state["iteration"], checkpointer.directory, tp_size=tp, pp_size=pp))
        tokens_D = torch.tensor(state["tokens"], dtype=torch.float64)
        interval = LogInterval.from_state_dict(state["log_interval"])
        return Progress(state["iteration"], state["consumed_samples"], tokens_D), interval
    if config.checkpoint.pretrained_checkpoint is not None:
        checkpointer.load_weights(Path(config.checkpoint.pretrained_checkpoint))
    num_sources = len(config.data.sources)
    return Progress(0, 0, torch.zeros(num_sources, dtype=torch.float64)), LogInterval.start(num_sources)


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    """Only rank 0 speaks."""
