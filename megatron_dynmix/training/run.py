"""One rank of a run: join the job, build everything, train."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from megatron_dynmix.training.checkpoint import (
    TRACKER,
    Checkpointer,
    latest_checkpoint,
    read_run_state,
    write_atomically,
)
from megatron_dynmix.training.model import build_model
from megatron_dynmix.training.optimizer import build_optimizer
from megatron_dynmix.training.probe import Probe
from megatron_dynmix.training.reweighting import Reweighting, build_strategy
from megatron_dynmix.training.sources import build_blend, build_rows, initial_weights, prepare_sources
from megatron_dynmix.training.step import PassRunner
from megatron_dynmix.training.trainer import Progress, Trainer, seed_iteration


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    reports: list[SourceReport]
    """What became of each source's examples when it was prepared."""
    train: list[PackedRows]
    probe: list[PackedRows]


def check_run_dir(run_dir: Path, resume: str) -> None:
    """Refuse a run directory that does not go with `resume`.

    Args:
        run_dir: the run directory.
        resume: `no`, `must` or `auto`.

    Raises:
        InputError: the directory holds a run and must not, or holds none and must, or cannot be written.

    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written ({error.strerror}); give another --run-dir") from None
    has_checkpoint = (run_dir / "checkpoints" / TRACKER).is_file()
    if resume == "must" and not has_checkpoint:
        raise InputError(
            f"--resume must, but {run_dir / 'checkpoints'} holds no checkpoint; use --resume auto"
        )
    if resume == "no" and (has_checkpoint or (run_dir / "metrics.jsonl").is_file()):
        raise InputError(
            f"{run_dir} holds a run already; give another --run-dir, or go on with it: --resume auto"
        )
    if has_checkpoint:
        read_run_state(latest_checkpoint(run_dir / "checkpoints"))


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
    if config.checkpoint.pretrained_checkpoint is not None:
        latest_checkpoint(Path(config.checkpoint.pretrained_checkpoint))
    return tokenizer


def train(config: RunConfig, run_dir: Path, *, resume: str = "no") -> Trainer:
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
    # The first rank of each node (which may have a disk of its own) prepares and packs before it joins, so
    # that nothing can still be refused once the others wait for it; they find its files.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    data = read_data(config, tokenizer) if first else None
    join_job(config)
    torch.distributed.barrier()
    data = data or read_data(config, tokenizer)
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
            distributed_timeout_minutes=int(config.parallel.distributed_timeout_minutes) or 1,
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
    reports = [report for _, report in prepare_sources(config, tokenizer)]
    probing = config.mixing.strategy == "gate-load" and config.mixing.signal == "probe"
    return Data(
        reports=reports[: len(config.data.sources)],
        train=build_rows(config, tokenizer, probe=False),
        probe=build_rows(config, tokenizer, probe=True) if probing else [],
    )


def build_trainer(
    config: RunConfig, run_dir: Path, data: Data, here: platform.Platform, *, resume: str
) -> Trainer:
    """Model, optimizer, blend, probe and writers of this rank, at the state that `resume` asks for."""
    rank0 = torch.distributed.get_rank() == 0
    transformer = transformer_config(config)
    seed_iteration(config.training.seed, -1)  # of the time before the first iteration
    model = build_model(config, transformer, here)
    optimizer, scheduler = build_optimizer(config, model)
    layers = moe_layers(transformer)
    counter = GateLoadCounter(len(data.train), len(layers), transformer.num_moe_experts or 1, here.device)
    attach_counter([model], counter, layers)
    run = PassRunner(
        model=model,
        platform=here,
        counter=counter,
        seq_length=config.data.seq_length,
        sequence_parallel=transformer.sequence_parallel,
    )
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
        directory=run_dir / "checkpoints", model=model, optimizer=optimizer, scheduler=scheduler
    )
    say = _say if rank0 else _silent
    resuming = resume != "no" and (checkpointer.directory / TRACKER).is_file()
    progress = _restore(config, checkpointer, reweighting, len(data.train), say, resuming=resuming)
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
        progress=progress,
        say=say,
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
    num_sources: int,
    say: Any,
    *,
    resuming: bool,
) -> Progress:
    """Where the run starts: at its checkpoint, at another run's weights, or at nothing."""
    size = config.parallel.size
    layout = {
        "tp_size": size("tensor_model_parallel_size"),
        "pp_size": size("pipeline_model_parallel_size"),
    }
    if resuming:
        state = checkpointer.load()
        reweighting.load_state_dict(state["mixing"])
        say(loading_line(state["iteration"], checkpointer.directory))
        say(loaded_line(state["iteration"], checkpointer.directory, **layout))
        tokens_D = torch.tensor(state["tokens"], dtype=torch.float64)
        return Progress(state["iteration"], state["consumed_samples"], tokens_D)
    if config.checkpoint.pretrained_checkpoint is not None:
        checkpointer.load_weights(Path(config.checkpoint.pretrained_checkpoint))
    return Progress(0, 0, torch.zeros(num_sources, dtype=torch.float64))


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    """Only rank 0 speaks."""
