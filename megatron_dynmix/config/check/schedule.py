"""How long a run is, and the schedule of its learning rate."""

from __future__ import annotations

from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.run_config import RunConfig
from megatron_dynmix.errors import InputError


def check_length(config: RunConfig) -> None:
    """Refuse a run without a length, or whose learning rate has no time to decay."""
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


def check_wsd(config: RunConfig) -> None:
    """Refuse a warm-up, stable, decay schedule that does not fit the run."""
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
