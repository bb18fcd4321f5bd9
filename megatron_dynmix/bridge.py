"""The mix in Megatron-Bridge's own loop (0.6), by its hooks, dataset provider, callbacks and manager.

Nothing of Megatron-Bridge is replaced. Its loop tells of a step before it counts it, and not at all of one
that it skips, so steps are counted as done when the loop's own count of samples shows that they are.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.errors import InputError

if TYPE_CHECKING:  # it brings Megatron-Core, whose stand-ins must come first
    from megatron_dynmix.training.mixed_run import MixedRun, RowMasks

STATE = "dynmix"
"""Its name among what Megatron-Bridge saves of a run's progress, which does without it, too."""
Sources = Callable[[Any], Mapping[str, Any]]
"""From Megatron-Bridge's `DatasetBuildContext` to the training rows of each source, by name."""


def mix(
    config: Any,
    forward_step: Callable[..., Any],
    mixing: MixingConfig | Mapping[str, Any],
    *,
    sources: Sources,
    rows: RowMasks | None = None,
    validation: Callable[[Any], Iterator[Any]] | None = None,
    **given: Any,
) -> tuple[Callable[..., Any], MixCallback]:
    """Change a `ConfigContainer` so that its run mixes; return forward step and callback for `pretrain`.

    `config.dataset` gives way to the mix of `sources`, whose rows hold what the forward step reads. `rows` is
    that of `MixedRun.announce`; `validation` makes an iterator, needed where `eval_iters` is above 0; what
    else is `given` (weights, max_epochs, run_dir, log_interval, ...) goes to `MixedRun.of`.

    Raises:
        InputError: (a ValueError) a setting of the run cannot be followed.

    """
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

    _check(config, validation)
    loop = _Loop(config, mixing, sources, rows, validation, given)
    DatasetProvider.register(MixedProvider)
    config.dataset = MixedProvider(
        seq_length=config.model.seq_length,
        num_workers=getattr(config.dataset, "num_workers", 2),
        pin_memory=getattr(config.dataset, "pin_memory", True),
        skip_getting_attention_mask_from_dataset=getattr(
            config.dataset, "skip_getting_attention_mask_from_dataset", True
        ),
    )
    config.dataset.loop = loop
    register_allowed_target_prefix(__name__)
    config.checkpoint.custom_manager_class = f"{__name__}.{MixedCheckpointManager.__name__}"
    if hasattr(config.model, "pre_wrap_hooks"):
        config.model.pre_wrap_hooks.append(loop.built)
    else:
        config.model.register_pre_wrap_hook(loop.built)
    return loop.announced(forward_step), MixCallback(loop)


def _check(config: Any, validation: Any) -> None:
    """Refuse, by name, what leaves no place for the mix."""
    refused = {
        "train.train_iters": (
            not config.train.train_iters,
            "is not given; give it instead of train_samples and num_epochs",
        ),
        "train.decrease_batch_size_if_needed": (
            getattr(config.train, "decrease_batch_size_if_needed", False),
            "changes batches as it goes; leave it out",
        ),
        "checkpoint.custom_manager_class": (
            config.checkpoint.custom_manager_class,
            "is given, and the mix needs that place; leave it out",
        ),
        "checkpoint.non_persistent_ckpt_type": (
            getattr(config.checkpoint, "non_persistent_ckpt_type", None),
            "is given, and such checkpoints do not hold the mix; leave it out",
        ),
        **{
            f"dataset.{name}": (
                getattr(config.dataset, name, False),
                "is set, but rows of the sources are stacked as they are; leave it out, and give whole rows",
            )
            for name in ("enable_in_batch_packing", "enable_offline_packing")
        },
        "dist.use_decentralized_pg": (
            getattr(config.dist, "use_decentralized_pg", False),
            "is set, but loads are summed over Megatron-Core's own groups; leave it out",
        ),
        "model.cuda_graph_impl": (
            getattr(config.model, "cuda_graph_impl", "none") not in (None, "none"),
            "is set, but a graph counts nothing; set it to none",
        ),
        "validation.eval_iters": (
            config.validation.eval_iters and validation is None,
            "is above 0, but no validation iterator is given; give one, or set it to 0",
        ),
    }
    for name, (wrong, what) in refused.items():
        if wrong:
            raise InputError(f"{name} {what}")


class _Loop:
    """One call of `pretrain`, and how far it has told of itself."""

    def __init__(
        self,
        config: Any,
        mixing: MixingConfig | Mapping[str, Any],
        sources: Sources,
        rows: RowMasks | None,
        validation: Callable[[Any], Iterator[Any]] | None,
        given: Mapping[str, Any],
    ) -> None:
        self.config, self.mixing, self.sources, self.rows = config, mixing, sources, rows
        self.validation, self.given = validation, given
        self.chunks: list[torch.nn.Module] = []
        self.saved: Mapping[str, Any] | None = None
        self.run: MixedRun | None = None
        self.start = (0, 0)
        """Iterations and samples of a checkpoint without a mix, after which this one began."""
        self.ended: dict[str, Any] | None = None
        """How the step under way went, once the loop has told; it is not counted yet."""

    def built(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Take note of the model; a pre-wrap hook."""
        self.chunks = list(chunks)
        return chunks

    def begin(self, datasets: Mapping[str, Any], done: tuple[int, int]) -> MixedRun:
        """Make the run, or return it for another model chunk; `done` are iterations and samples."""
        if self.run is not None:
            return self.run
        from megatron_dynmix.training.mixed_run import MixedRun

        train = self.config.train
        self.start = tuple(self.saved["start"]) if self.saved else done
        ramp = getattr(train, "rampup_batch_size", None)
        schedule = BatchSchedule.growing(train.global_batch_size, ramp and tuple(map(int, ramp)))
        steps = dict((max(sample - self.start[1], 0), size) for sample, size in schedule.steps)
        self.run = MixedRun.of(
            {name: len(rows) for name, rows in datasets.items()},
            self.mixing,
            train_iters=train.train_iters - self.start[0],
            batch_sizes=BatchSchedule(tuple(steps.items())),
            micro_batch_size=train.micro_batch_size,
            seq_length=self.config.model.seq_length,
            seed=self.config.rng.seed,
            **self.given,
        )
        self.run.attach(self.chunks)
        if self.saved:
            self.run.load_state_dict(self.saved["run"])
        place = (self.run.iteration + self.start[0], self.run.consumed_samples + self.start[1])
        if place != done:
            raise InputError(
                f"the mix of the checkpoint stands at iteration and sample {place}, the loop at {done}; go "
                "on from a whole checkpoint, or begin with finetune"
            )
        return self.run

    def read(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield micro-batches; nothing in an iteration that the loop skips, which drops what it reads."""
        while True:
            run = self.run
            assert run is not None, "made with the datasets"
            yield next(batches) if run.in_step and self.ended is None else None

    def announced(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a forward step, in whichever of the forms that Megatron-Bridge knows."""

        @functools.wraps(forward_step)
        def step(*given: Any, **named: Any) -> Any:
            model = next(it for it in (*given, *named.values()) if isinstance(it, torch.nn.Module))
            if self.run is not None and self.run.in_step and model.training:
                from megatron.core.utils import get_attr_wrapped_model

                chunk = get_attr_wrapped_model(model, "vp_stage", allow_none=True) or 0
                self.run.announce(chunk=chunk, rows=self.rows)
            return forward_step(*given, **named)

        return step

    def settle(self, consumed_samples: int) -> None:
        """Count what the loop has done so far, by its own count of samples; every rank comes here."""
        run = self.run
        if run is None:
            return
        consumed = consumed_samples - self.start[1]
        if self.ended is not None:
            ended, self.ended = self.ended, None
            run.end_step(min(consumed, run.consumed_samples + run.batch_size), **ended)
        while run.consumed_samples < consumed:  # skipped, and nobody was told
            run.begin_step()
            run.end_step(applied=False)


@dataclass(kw_only=True)
class MixedProvider:
    """The mix as Megatron-Bridge's `DatasetProvider`; the fields are those of its `DataloaderConfig`.

    Beside them is what its forward step asks of a dataset's settings.
    """

    seq_length: int
    skip_getting_attention_mask_from_dataset: bool = True
    dataloader_type: str = "external"
    num_workers: int = 2
    data_sharding: bool = True
    pin_memory: bool = True
    drop_last: bool = True
    persistent_workers: bool = True
    trust_remote_code: bool | None = None
    dataloader_save: str | None = None
    dataloader_load: str | None = None
    done: tuple[int, int] = field(default=(0, 0), init=False)
    """Iterations and samples behind the run, which the manager has found."""

    def build_datasets(self, context: Any) -> tuple[Any, Any, Any]:
        """Return iterators over what is to be trained on, and validated; for each model chunk anew."""
        loop: _Loop = self.loop  # type: ignore[attr-defined]  # no setting, so no field
        datasets = loop.sources(context)
        run = loop.begin(datasets, self.done)
        batches = run.batches(
            list(datasets.values()), num_workers=self.num_workers, pin_memory=self.pin_memory
        )
        held_out = [None, None] if loop.validation is None else [loop.validation(context) for _ in range(2)]
        return loop.read(batches), *held_out


class MixCallback:
    """What Megatron-Bridge's loop tells; of a callback it asks the names of the events, and no more."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def on_train_step_start(self, context: Any) -> None:
        """Count what came before, and begin."""
        self._loop.settle(context.state.train_state.consumed_train_samples)
        assert self._loop.run is not None, "made with the datasets"
        self._loop.run.begin_step()

    def on_train_step_end(self, context: Any) -> None:
        """Keep how it went until the loop has counted it; an evaluation may come before."""
        groups = context.optimizer.param_groups
        self._loop.ended = {
            "applied": not context.skipped_iter,
            "lr": groups[0]["lr"] if groups else math.nan,
            "grad_norm": math.nan if context.grad_norm is None else float(context.grad_norm),
        }
        assert self._loop.run is not None, "made with the datasets"
        self._loop.run.pause()

    def on_train_end(self, context: Any) -> None:
        """Count the last step, and hand the records to the disk."""
        self._loop.settle(context.state.train_state.consumed_train_samples)
        if self._loop.run is not None:
            self._loop.run.close()


class MixedCheckpointManager:
    """Megatron-Bridge's own manager, with the mix in what it saves of the run's progress."""

    def __init__(self, checkpoint_config: Any) -> None:
        from megatron.bridge.training.checkpointing import DefaultCheckpointManager

        self._own = DefaultCheckpointManager(checkpoint_config)

    @property
    def checkpointing_context(self) -> dict[str, Any]:
        """What it keeps between saves."""
        context: dict[str, Any] = self._own.checkpointing_context
        return context

    def save(self, ctx: Any, callback_manager: Any = None) -> None:
        """Save, with the mix as it is after the last whole step; plain Megatron-Bridge loads it too."""
        loop, train_state = ctx.state.cfg.dataset.loop, ctx.state.train_state
        loop.settle(train_state.consumed_train_samples)
        if loop.run is None:
            self._own.save(ctx, callback_manager)
            return
        text = json.dumps({"start": loop.start, "run": loop.run.state_dict()})
        told = {**train_state.state_dict(), STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}
        train_state.state_dict = lambda: told  # it is asked once, before anything is written
        try:
            self._own.save(ctx, callback_manager)
        finally:
            del train_state.state_dict

    def load(self, ctx: Any) -> tuple[int, int]:
        """Load, and find the mix in what was saved; a checkpoint without one begins a mix."""
        from megatron.bridge.training.utils.checkpoint_utils import (
            get_checkpoint_name,
            get_checkpoint_train_state_filename,
        )

        answer: tuple[int, int] = self._own.load(ctx)
        state, provider = ctx.state.train_state, ctx.state.cfg.dataset
        provider.done = (state.step, state.consumed_train_samples)
        folder = ctx.state.cfg.checkpoint.load
        if state.step and folder is not None:
            path = Path(get_checkpoint_train_state_filename(get_checkpoint_name(folder, state.step)))
            found = [None]
            if torch.distributed.get_rank() == 0 and path.is_file():
                text = torch.load(path, weights_only=True).get(STATE)
                found = [None if text is None else json.loads(bytes(text.tolist()))]
            torch.distributed.broadcast_object_list(found, src=0)
            provider.loop.saved = found[0]
        return answer

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        """End what is still being written."""
        self._own.finalize_async_saves(state, blocking=blocking, terminate=terminate)
