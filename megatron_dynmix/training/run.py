"""One rank of a run: join the job, build everything at the state it starts from, train."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_dynmix import platform
from megatron_dynmix.checkpoint.checkpointer import Checkpointer
from megatron_dynmix.checkpoint.folder import exact, verified
from megatron_dynmix.checkpoint.run_state import RunState, read_run_state
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.attention_experts import counted_experts
from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.host import joins_rows, with_defaults
from megatron_dynmix.config.megatron import micro_batch_group, moe_layers, transformer_config
from megatron_dynmix.data.blend_plan import BlendPlan
from megatron_dynmix.data.loader import BlendLoader
from megatron_dynmix.data.source_set import Prints, SourceSet, differences
from megatron_dynmix.data.sources import plan_blend
from megatron_dynmix.job.heartbeat import heartbeat_of_job
from megatron_dynmix.job.signals import StopRequest
from megatron_dynmix.lease import Lease
from megatron_dynmix.model.gpt import build_model, build_modules
from megatron_dynmix.model.lr_schedule import build_scheduler
from megatron_dynmix.model.optimizer import build_optimizer
from megatron_dynmix.moe.counter import GateLoadCounter
from megatron_dynmix.moe.router import attach_counter
from megatron_dynmix.plan.parameters import this_host
from megatron_dynmix.records.live_line import LiveLine
from megatron_dynmix.records.logline import loaded_line, loading_line
from megatron_dynmix.records.writer import open_writer, recorded
from megatron_dynmix.training.data_tables import packed_table, prepared_table
from megatron_dynmix.training.holding import holding
from megatron_dynmix.training.mixed_steps import MixedSteps
from megatron_dynmix.training.probe import Probe
from megatron_dynmix.training.resume import Resume, begins, check_resume, identity
from megatron_dynmix.training.reweighting import told_first_weights
from megatron_dynmix.training.setup import PreparedRun
from megatron_dynmix.training.start_report import report_start
from megatron_dynmix.training.step import PassRunner, set_batch_size
from megatron_dynmix.training.trainer import Trainer, seed_iteration


def restore(
    config: RunConfig,
    checkpointer: Checkpointer,
    mixed: MixedSteps,
    prints: Prints,
    say: Callable[[str], None],
    source: Path | None,
) -> list[str]:
    """Load what the run starts from, checkpoint `source` or first weights, into model, optimizer and mix.

    Return what became of each source, if `prints` are not those of the checkpoint.
    """
    if source is None:
        _load_first_weights(config, checkpointer, say)
        return []
    state, changes = _carried(checkpointer.load(source), mixed.plan, prints)
    mixed.resume(state)
    size = config.parallel.size
    tp, pp = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
    say(loading_line(state.progress.iteration, checkpointer.directory))
    say(loaded_line(state.progress.iteration, checkpointer.directory, tp_size=tp, pp_size=pp))
    for change in changes:
        say(f"  from sample {state.progress.consumed_samples} on: {change}")
    return changes


def _load_first_weights(config: RunConfig, checkpointer: Checkpointer, say: Callable[[str], None]) -> None:
    """Load the weights of another run or of a Hugging Face folder, and keep what belongs beside them."""
    pretrained, load_hf = config.checkpoint.pretrained_checkpoint, config.model.load_hf
    if pretrained is None and load_hf is None:
        return
    from megatron_dynmix.convert.export_hf import keep_origin

    if pretrained is not None:
        checkpointer.load_weights(exact(verified(Path(pretrained))))
    else:
        from megatron_dynmix.convert.import_hf import load_hugging_face

        load_hugging_face(config, checkpointer.load_tensors, say)
    keep_origin(config, checkpointer.directory)


def _carried(state: RunState, plan: BlendPlan, prints: Prints) -> tuple[RunState, list[str]]:
    """Return the state for the sources of now, and what was done to it; `check_resume` has allowed it."""
    if not differences(state.fingerprints, prints):
        return state, []
    from megatron_dynmix.training.source_change import SourceChange

    change = SourceChange.between(
        SourceSet.of(state.fingerprints, state.mix.blend.sizes),
        SourceSet.of(prints, plan.sizes_D.tolist()),
    )
    return change.carry(state, plan.weights_D)


def train(
    prepared: PreparedRun, run_dir: Path, *, resume: Resume = "no", allow_source_change: bool = False
) -> Trainer:
    """Train on this rank what `set_up` has prepared; every rank of the job calls it with the same arguments.

    Raises:
        TrainingStopped: the run ended early; its last good state is kept.
        StoppedOnRequest: a signal asked for it; the state is kept.

    """
    config = prepared.config
    timeout_minutes = config.parallel.distributed_timeout_minutes
    with contextlib.ExitStack() as held:
        heartbeat = held.enter_context(heartbeat_of_job(timeout_minutes))
        stop = held.enter_context(StopRequest().listening())
        join_job(config, heartbeat.store)
        torch.distributed.barrier()
        lease = held.enter_context(holding(run_dir, resume, stop))
        source, notes, changes = None, [], []
        # Rank 0's eyes: a shared disk may show a new folder to some ranks later.
        resuming = [not begins(run_dir, resume)]
        torch.distributed.broadcast_object_list(resuming, src=0)
        if resuming[0]:
            point = verified(run_dir / "checkpoints")
            source, notes = point.source, list(point.notes)
            changes = check_resume(
                *(config, prepared.data.reports, run_dir, resume),
                allow_source_change=allow_source_change,
                source=source,
            )
            prepared = prepared.after(read_run_state(source).progress.batches)
        if torch.distributed.get_rank() == 0:
            report_start(prepared, run_dir, changes, notes)
        trainer = build_trainer(prepared, run_dir, resume=resume, source=source, lease=lease)
        held.enter_context(
            recorded(
                *(run_dir, lambda: trainer.progress.iteration),
                resumed=source is not None,
                notes=[*changes, *notes],
                lease=lease,
            )
        )
        trainer.fit(stop, heartbeat)
    return trainer


def join_job(config: RunConfig, store: torch.distributed.Store | None = None) -> None:
    """Make process groups and micro-batch arithmetic; give each rank one thread."""
    torch.set_num_threads(1)  # ranks share the cores; more threads would also change the order of sums
    platform.init_process_group(config.parallel.distributed_timeout_minutes, store)
    size, parallel = config.parallel.size, config.parallel.megatron
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=size("tensor_model_parallel_size"),
            pipeline_model_parallel_size=size("pipeline_model_parallel_size"),
            virtual_pipeline_model_parallel_size=config.parallel.virtual_stages or None,
            context_parallel_size=size("context_parallel_size"),
            expert_model_parallel_size=size("expert_model_parallel_size"),
            expert_tensor_parallel_size=parallel.get("expert_tensor_parallel_size"),
            num_distributed_optimizer_instances=size("num_distributed_optimizer_instances"),
            distributed_timeout_minutes=config.parallel.distributed_timeout_minutes,
        )
    set_batch_size(config, BatchSchedule.of(config).batch_size(0))


def build_trainer(
    prepared: PreparedRun,
    run_dir: Path,
    *,
    resume: Resume = "no",
    source: Path | None = None,
    lease: Lease | None = None,
) -> Trainer:
    """Build model, optimizer, blend, probe and writers of this rank, at the state of checkpoint `source`."""
    config, data, here = prepared.config, prepared.data, platform.start()
    rank0 = torch.distributed.get_rank() == 0
    seed_iteration(config.training.seed, -1)  # of the time before the first iteration
    run = build_runner(config, len(data.train), here)
    optimizer = build_optimizer(config, run.chunks)
    batching = {
        "micro_batch_size": config.training.micro_batch_size,
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }
    mine = identity(config, data.reports)
    mixed = _build_mixed(prepared, run, batching, mine.fingerprints, run_dir)
    checkpointer = Checkpointer(
        directory=run_dir / "checkpoints",
        chunks=run.chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, prepared.mix.horizon.schedule),
        keep_last=config.checkpoint.keep_last,
        lease=lease,
    )
    say: Callable[[str], None] = partial(print, flush=True) if rank0 else lambda _: None
    source_changes = restore(config, checkpointer, mixed, mine.fingerprints, say, source)
    iteration = mixed.progress.iteration
    live = LiveLine(tuple(config.data.sources), config.training.train_iters or 0, iteration, silent=not rank0)
    # A run that died before its first checkpoint begins again: its records are those of no state.
    keep_until = None if resume == "no" else iteration if source else -1
    tables = [prepared_table(data.reports), packed_table([*data.train, *data.probe])]
    trainer = Trainer(
        config=config,
        run=run,
        optimizer=optimizer,
        loader=BlendLoader(
            mixed.plan,
            data.train,
            num_workers=config.data.num_workers,
            pin_memory=here.pin_memory,
            most_segments=run.most_segments(data.train),
            **batching,
        ),
        mixed=mixed,
        checkpointer=checkpointer,
        writer=open_writer(config, run_dir, tables, resume_iteration=keep_until, lease=lease)
        if rank0
        else None,
        identity=mine,
        live=live,
    )
    if source is None:
        trainer.record_stage("start", 0)
    elif source_changes:
        # The checkpoint is of before the change: a run resumed from it must not find the change on record.
        trainer.record_stage("sources changed", iteration + 1, source_changes)
    return trainer


def _build_mixed(
    prepared: PreparedRun, run: PassRunner, batching: dict[str, int], prints: Prints, run_dir: Path
) -> MixedSteps:
    """Return the steps of the run, with the blend at its first weights and the probe."""
    config, data, mix = prepared.config, prepared.data, prepared.mix
    probe = None
    if data.probe:
        probe = Probe(
            data.probe,
            run,
            probe_tokens=config.mixing.probe_tokens,
            seq_length=config.data.seq_length,
            rotating=config.mixing.probe_rows == "rotating",
            pin_memory=run.platform.pin_memory,
            most_segments=run.most_segments(data.probe),
            **batching,
        )
    mixed = MixedSteps(
        mix,
        plan_blend(config, data.train, told_first_weights(mix, run.platform.device)),
        prints=prints,
        seq_length=config.data.seq_length,
        here=run.platform,
        override_file=Path(config.mixing.override_file or run_dir / "override.json"),
    )
    mixed.count_with(run.counter, probe)
    return mixed


def build_runner(
    config: RunConfig, num_sources: int, here: platform.Platform, *, trains: bool = True
) -> PassRunner:
    """Build the model, and the counter that its routers write into; without gradients if it is only run."""
    transformer = transformer_config(with_defaults(config, this_host()))
    build = build_model if trains else build_modules
    chunks = list(build(config, transformer, here))
    layers = moe_layers(transformer)
    counter = GateLoadCounter(
        num_sources,
        len(layers),
        counted_experts(config, transformer.num_moe_experts),
        here.device,
        trained_only=config.mixing.load_tokens == "trained",
        by_probability=config.mixing.load_mass == "probability",
    )
    join_rows = joins_rows(config, here.transformer_engine)
    row_length = config.data.seq_length if join_rows else None
    of_attention = config.mixing.load_routers == "attention"
    attach_counter(chunks, counter, layers, row_length, of_attention=of_attention)
    return PassRunner(
        chunks=chunks,
        platform=here,
        counter=counter,
        seq_length=config.data.seq_length,
        sequence_parallel=transformer.sequence_parallel,
        join_rows=join_rows,
        micro_batch_group=micro_batch_group(transformer),
    )
