"""The learning rate of a run: Megatron-Core's schedule, counted in samples as Megatron-LM's is.

Settings in iterations mean the iterations of the run. Those behind it took the samples that they took, those
ahead take the batch sizes of now: so the decay ends with the run, however often the batch size changed.
"""

from __future__ import annotations

from types import SimpleNamespace

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.batch_schedule import BatchSchedule


def build_scheduler(
    config: RunConfig, optimizer: MegatronOptimizer, batches: BatchSchedule
) -> OptimizerParamScheduler:
    """Build the schedule of a run with these batches behind it and ahead."""
    settings, train_iters = config.optimizer, config.training.train_iters
    assert train_iters is not None, "checked before start"
    decay_iters = settings.lr_decay_iters or train_iters
    decay_samples, wsd_samples = batches.samples_at(decay_iters), settings.lr_wsd_decay_samples
    if settings.lr_wsd_decay_iters is not None:
        wsd_samples = decay_samples - batches.samples_at(decay_iters - settings.lr_wsd_decay_iters)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=batches.samples_at(settings.lr_warmup_iters),
        lr_decay_steps=decay_samples,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=batches.samples_at(train_iters),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # the configuration decides, also when a run is resumed
        wsd_decay_steps=wsd_samples,
        lr_wsd_decay_style=settings.lr_wsd_decay_style or "exponential",
    )


def set_learning_rate(scheduler: OptimizerParamScheduler, consumed_samples: int) -> None:
    """Give the optimizer the learning rate of the step that begins here: it follows from nothing else."""
    scheduler.num_steps = consumed_samples
    scheduler.step(increment=0)


def learning_rate(config: RunConfig, batches: BatchSchedule, consumed_samples: int) -> float:
    """Return the learning rate that a run has once so many samples are consumed."""
    group = {"lr": 0.0}
    scheduler = build_scheduler(config, SimpleNamespace(param_groups=[group]), batches)
    set_learning_rate(scheduler, consumed_samples)
    return group["lr"]
