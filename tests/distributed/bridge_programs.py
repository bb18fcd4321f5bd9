"""Megatron-Bridge's loop in small, with the names and the order of events of 0.6, around `bridge.mix`."""

import importlib.util
import os
import sys
from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dynmix.model.lr_schedule import set_learning_rate
from megatron_dynmix.training.batch import to_batch
from megatron_dynmix.training.step import set_batch_size
from megatron_dynmix.training.trainer import seed_iteration
from tests.distributed import loop_programs, programs

EXAMPLE = Path(__file__).parents[2] / "examples/megatron_bridge/pretrain.py"


class TrainState:
    def __init__(self, step=0, consumed_train_samples=0):
        self.step, self.consumed_train_samples = step, consumed_train_samples

    def state_dict(self):
        return {name: torch.tensor(value) for name, value in vars(self).items() if isinstance(value, int)}


def name_of(folder, step):
    return f"{folder}/iter_{step:07d}"


def file_of(folder, prefix=None):
    return f"{folder}/train_state.pt"


class DefaultCheckpointManager:
    """Saves how far the loop is, as 0.6 does, and no model."""

    def __init__(self, config):
        self.config, self.checkpointing_context = config, {}

    def save(self, ctx, callback_manager):
        state = ctx.state.train_state
        folder = self.config.save / f"iter_{state.step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        if torch.distributed.get_rank() == 0:
            torch.save(state.state_dict(), folder / "train_state.pt")

    def load(self, ctx):
        if self.config.load is not None:
            found = torch.load(file_of(name_of(self.config.load, self.config.step)))
            step, samples = (found[name].item() for name in ("step", "consumed_train_samples"))
            ctx.state.train_state = TrainState(step, samples)
        return ctx.state.train_state.step, 0

    def finalize_async_saves(self, state, blocking=False, terminate=False):
        """There are none."""


def stand_in():
    """Put what `bridge` imports of Megatron-Bridge where it looks; return the prefixes it has registered."""
    prefixes = []
    parts = {
        "": {},
        ".data": {},
        ".utils": {},
        ".training": {},
        ".training.utils": {},
        ".data.base": {"DatasetProvider": type("DatasetProvider", (ABC,), {})},
        ".utils.instantiate_utils": {"register_allowed_target_prefix": prefixes.append},
        ".training.checkpointing": {"DefaultCheckpointManager": DefaultCheckpointManager},
        ".training.utils.checkpoint_utils": {
            "get_checkpoint_name": name_of,
            "get_checkpoint_train_state_filename": file_of,
        },
    }
    for name, content in parts.items():
        module = ModuleType(f"megatron.bridge{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module
    return prefixes


def loop(config, forward_step, callbacks, *, skip=(), stop_at=None, undone=()):
    """Train as Megatron-Bridge's `pretrain` does; a step that is undone ends the job, which goes on."""
    from megatron_dynmix.bridge import MixedCheckpointManager

    (callback,), trainer = callbacks, config.model.trainer
    own = trainer.config
    training = own.training
    state = SimpleNamespace(cfg=config, train_state=TrainState())
    context = SimpleNamespace(state=state, optimizer=trainer.optimizer, skipped_iter=None, grad_norm=None)
    for hook in config.model.pre_wrap_hooks:
        hook(trainer.run.chunks)
    manager = MixedCheckpointManager(config.checkpoint)
    manager.load(context)
    batches = config.dataset.build_datasets(SimpleNamespace(tokenizer=Tokenizer()))[0]
    while state.train_state.step < (stop_at or training.train_iters):
        size, at = training.global_batch_size, state.train_state.step + 1
        micro_batches = set_batch_size(own, size)
        if at in skip:
            for _ in range(micro_batches):
                next(batches)
        else:
            callback.on_train_step_start(context)
            for attempt in range(1 + (at in undone)):
                if attempt:  # a job that ended before the step was counted, and goes on
                    callback.on_train_step_end(context)
                    manager.save(context)
                    callback.on_train_step_start(context)
                seed_iteration(training.seed, state.train_state.step)
                set_learning_rate(trainer.checkpointer.scheduler, state.train_state.consumed_train_samples)
                trainer.run.chunks[0].zero_grad_buffer()
                trainer.optimizer.zero_grad()
                get_forward_backward_func()(
                    forward_step_func=lambda batches, model: forward_step(state, batches, model),
                    data_iterator=batches,
                    model=trainer.run.chunks[0],
                    num_microbatches=micro_batches,
                    seq_length=own.data.seq_length,
                    micro_batch_size=training.micro_batch_size,
                    forward_only=False,
                )
            _, context.grad_norm, _ = trainer.optimizer.step()
            context.skipped_iter = False
            callback.on_train_step_end(context)
        state.train_state.step += 1
        state.train_state.consumed_train_samples += size
    manager.save(context)
    callback.on_train_end(context)
    torch.distributed.barrier()


def container(trainer, folder, *, resume_at=None, dataset):
    """A `ConfigContainer` of what `bridge` and this loop read of one."""
    training = trainer.config.training
    return SimpleNamespace(
        train=SimpleNamespace(
            train_iters=training.train_iters,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
        ),
        model=SimpleNamespace(seq_length=trainer.config.data.seq_length, pre_wrap_hooks=[], trainer=trainer),
        dataset=dataset,
        checkpoint=SimpleNamespace(
            save=folder / "saved",
            load=None if resume_at is None else folder / "saved",
            step=resume_at,
            custom_manager_class=None,
        ),
        dist=SimpleNamespace(),
        rng=SimpleNamespace(seed=training.seed),
        validation=SimpleNamespace(eval_iters=0),
    )


def pretrain(run_yaml, flags, run_dir, *, resume_at=None, **how):
    """Train as Megatron-Bridge does; return what was written."""
    prefixes = stand_in()
    from megatron_dynmix.bridge import mix

    trainer = programs.build(run_yaml, flags, run_dir.with_name(f"{run_dir.name}-{resume_at}-model"))
    rows = dict(zip(trainer.config.data.sources, trainer.loader.sources, strict=True))
    dataset = SimpleNamespace(num_workers=0, pin_memory=False)
    config = container(trainer, run_dir, resume_at=resume_at, dataset=dataset)

    def masks(draws):
        drawn = [list(rows.values())[source][row] for source, row, _ in draws]
        padding_BS = torch.stack([torch.from_numpy(row["padding_mask"]) for row in drawn])
        return padding_BS, torch.stack([torch.from_numpy(row["loss_mask"]) for row in drawn]) > 0

    def forward_step(state, data_iterator, model, return_schedule_plan=False):
        batch = to_batch(next(data_iterator), torch.device("cpu"), join_rows=False)
        loss = model(
            *(batch.tokens, batch.position_ids, batch.attention_mask),
            **{"labels": batch.labels, "loss_mask": batch.loss_mask, "padding_mask": batch.padding_mask},
        )
        return loss, lambda loss: trainer.run._loss(loss, batch)

    mixing = trainer.config.mixing
    step, callback = mix(
        config, forward_step, mixing, sources=lambda context: rows, rows=masks, run_dir=run_dir
    )
    assert prefixes == ["megatron_dynmix.bridge"]
    assert config.checkpoint.custom_manager_class == "megatron_dynmix.bridge.MixedCheckpointManager"
    loop(config, step, [callback], **how)
    return loop_programs.written(run_dir)


def pretrain_twice(run_yaml, flags, run_dir, stop_at):
    """A run that is stopped and goes on, with the optimizer's and the model's state left out of it."""
    pretrain(run_yaml, flags, run_dir, stop_at=stop_at)
    return pretrain(run_yaml, flags, run_dir, resume_at=stop_at)


class Tokenizer:
    """What a dataset asks of one."""

    eod, vocab_size, unique_identifiers = 0, 256, {"class": "Tokenizer"}


def load_example(interval):
    """Import the recipe of the examples, with weights that change more often than there."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    mix = example.mix
    example.mix = lambda config, step, mixing, **given: mix(
        config, step, {**mixing, "interval": interval}, **given
    )
    return example


def run_example(run_yaml, flags, folder, prefixes, interval):
    """The example in this loop, with a small model; return what was written."""
    stand_in()
    os.chdir(folder)
    trainer = programs.build(run_yaml, flags, folder / "model")
    length = trainer.config.data.seq_length
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)

    def recipe():
        blend = Blend(
            random_seed=1,
            sequence_length=length,
            split="100,0,0",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return container(trainer, folder, dataset=blend)

    def forward_step(state, data_iterator, model, return_schedule_plan=False):
        batch = next(data_iterator)
        losses = model(batch["tokens"], batch["position_ids"], causal, labels=batch["labels"])
        return losses, lambda losses: (losses.sum(), torch.tensor(losses.numel()), {})

    for name, content in {
        "recipes.qwen": {"qwen3_30b_a3b_pretrain_config": recipe},
        "training.gpt_step": {"forward_step": forward_step},
        "training.pretrain": {"pretrain": loop},
    }.items():
        module = ModuleType(f"megatron.bridge.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module
    sys.modules["megatron.bridge.recipes"] = ModuleType("megatron.bridge.recipes")
    load_example(interval).main(prefixes)
    return loop_programs.written(folder / "runs/bridge")


@dataclass
class Blend(GPTDatasetConfig):
    """Megatron-Bridge's way with it: checked when it is whole."""

    num_workers: int = 0
    pin_memory: bool = False

    def __post_init__(self):
        """Wait for `finalize`."""

    def finalize(self):
        super().__post_init__()
