"""Batches that the ranks can share."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError


def check_batch(config: RunConfig, pp: int, dp: int) -> None:
    """Refuse batches that so many replicas, or an interleaved pipeline, cannot share."""
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
