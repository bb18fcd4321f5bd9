"""What the ranks of a test run. Axes: L MoE layers, H halves, D sources, E experts."""

from functools import partial

import torch

from megatron_dynmix.checkpoint.tensors import own_slices
from megatron_dynmix.config.load import load_config
from megatron_dynmix.model.gpt import unwrap
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
        "blend": trainer.mixed.plan.state.to_json(),
        "routers": {
            name: parameter.detach().float().cpu().numpy().copy()
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
    """Counts [H, D, L, E] of one training step and of one probe; the step's sums and gradients."""
    trainer = build(run_yaml, flags, run_dir)
    reduce_gradients_whole(trainer.run.chunks)
    batches = trainer.loader.step(0, training_run_num_micro_batches())
    with trainer.run.counter.recording():
        stats = trainer.run(batches, forward_only=False)
    step_HDLE = reduce_counts(trainer.run.counter.take()).cpu().numpy()
    probe_HDLE = None
    if trainer.mixed.reweighting.probe is not None:
        probe_HDLE = trainer.mixed.reweighting.probe.measure({}, 0)[0].numpy()
    gradients = gradients_of(trainer.run.chunks)
    _, grad_norm, _ = trainer.optimizer.step()
    return {
        "gradients": gradients,
        "step_HDLE": step_HDLE,
        "probe_HDLE": probe_HDLE,
        "tokens_D": stats.tokens_D.numpy(),
        "trained_D": stats.trained_D.numpy(),
        "loss_sum_D": stats.loss_sum_D.numpy(),
        "lm_loss": stats.lm_loss,
        "grad_norm": float(grad_norm),
    }


def reduce_gradients_whole(chunks):
    """Have every rank get the whole gradient of its parameters, not only the shard that it steps."""
    config = chunks[0].config
    finalize = config.finalize_model_grads_func
    config.finalize_model_grads_func = lambda *args, **options: finalize(
        *args, **{**options, "force_all_reduce": True}
    )
    for chunk in chunks:
        chunk.force_all_reduce = True
    if isinstance(config.grad_sync_func, list):  # of an interleaved pipeline; it would reduce to shards
        config.grad_sync_func = [partial(_start_whole, chunk) for chunk in chunks]


def _start_whole(chunk, *unused):
    for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        group.start_grad_sync(force_all_reduce=True)


def gradients_of(chunks):
    """[(name, offset, gradient)] of this rank's slices of each tensor of a checkpoint; buffers as they are.

    The parameters are overwritten.
    """
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return [
        (
            own.key,
            own.global_offset,
            own.data.detach()
            .float()
            .reshape((1,) * own.prepend_axis_num + own.local_shape)
            .cpu()
            .numpy()
            .copy(),
        )
        for own in own_slices(map(unwrap, chunks))
    ]


def training_run_num_micro_batches():
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches()
