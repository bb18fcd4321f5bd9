"""What the ranks of a test run. Axes: L MoE layers, H halves, D sources, E experts."""

import torch

from megatron_dynmix.config.load import load_config
from megatron_dynmix.moe.counter import reduce_counts
from megatron_dynmix.records.jsonl import read_lines, read_records
from megatron_dynmix.records.schema import MixingUpdate, plain
from megatron_dynmix.records.signals import SIGNALS, with_signal
from megatron_dynmix.training import run as training_run
from megatron_dynmix.training.setup import check_before_start, prepare_run, set_up
from megatron_dynmix.training.trainer import TrainingStopped


def train_from(config, run_dir, **options):
    """A whole run, set up and trained; returns its trainer."""
    return training_run.train(set_up(config, run_dir, **options), run_dir, **options)


def train(run_yaml, flags, run_dir, **options):
    """A whole run; returns what it wrote."""
    trainer = train_from(load_config(run_yaml, flags), run_dir, **options)
    torch.distributed.barrier()
    return {
        **records_of(run_dir),
        "ledger": read_records(run_dir / "ledger.jsonl"),
        "blend": trainer.loader.blend.state.to_json(),
        "routers": {
            name: parameter.detach().float().numpy().copy()
            for chunk in trainer.run.chunks
            for name, parameter in chunk.named_parameters()
            if name.endswith("router.weight")
        },
    }


def records_of(run_dir):
    """What a run wrote of its training and of its updates."""
    updates = [plain(vars(update)) for update in updates_of(run_dir)]
    return {"metrics": read_records(run_dir / "metrics.jsonl"), "mixing": updates}


def updates_of(run_dir):
    """The updates on record, with their arrays."""
    updates = read_lines(run_dir / "mixing.jsonl", MixingUpdate)
    return [with_signal(update, run_dir / SIGNALS) for update in updates]


def train_until_stopped(run_yaml, flags, run_dir):
    """A run that is to end early; returns the message."""
    try:
        train(run_yaml, flags, run_dir)
    except TrainingStopped as stopped:
        return str(stopped)
    return None


def build(run_yaml, flags, run_dir):
    """The trainer of a run that has not begun."""
    config = load_config(run_yaml, flags)
    training_run.join_job(config)
    return training_run.build_trainer(prepare_run(check_before_start(config)), run_dir)


def save_initial_weights(run_yaml, flags, run_dir):
    """Weights that every layout can start from."""
    trainer = build(run_yaml, flags, run_dir)
    trainer.save(last=True)


def count_one_step(run_yaml, flags, run_dir):
    """Counts [L, H, D, E] of one training step and of one probe; the step's sums; the gradient norm."""
    trainer = build(run_yaml, flags, run_dir)
    batches = trainer.loader.step(0, training_run_num_micro_batches())
    with trainer.run.counter.recording():
        stats = trainer.run(batches, forward_only=False)
    step_HDLE = reduce_counts(trainer.run.counter.take()).numpy()
    probe_HDLE = None
    if trainer.reweighting.probe is not None:
        probe_HDLE = trainer.reweighting.probe.measure(trainer.run, {}, 0)[0].numpy()
    _, grad_norm, _ = trainer.optimizer.step()
    return {
        "step_HDLE": step_HDLE,
        "probe_HDLE": probe_HDLE,
        "tokens_D": stats.tokens_D.numpy(),
        "trained_D": stats.trained_D.numpy(),
        "loss_sum_D": stats.loss_sum_D.numpy(),
        "lm_loss": stats.lm_loss,
        "grad_norm": float(grad_norm),
    }


def training_run_num_micro_batches():
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches()
