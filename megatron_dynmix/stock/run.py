"""Mixing in stock's loop: what happens at each of the places where that is entered.

Legend: B rows of a micro-batch, S positions of a row.
"""

from __future__ import annotations

import functools
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_dynmix.errors import InputError, StoppedOnRequest
from megatron_dynmix.stock.evaluation import SourceLosses
from megatron_dynmix.stock.flags import caps_of, mixing_of, value_of
from megatron_dynmix.stock.inputs import PackedInputs
from megatron_dynmix.stock.refusals import check_flags, check_mix, check_records, check_sources
from megatron_dynmix.stock.sources import Blend, Sources, blends_of, prints_of, train_and_rest

if TYPE_CHECKING:
    from megatron_dynmix.config.run_config import MixingConfig
    from megatron_dynmix.training.mixed_run import MixedRun

MARKS = ("dataset_id", "row", "half", "segment_ids")
"""What batches say of themselves that stock's code does not know."""


class StockRun:
    """One call of `pretrain`: wraps what stock is given, and is what it calls at its seams."""

    evaluation_is_taken = False
    """Whether the script looks at evaluations itself, in a way that leaves no room for us."""

    def __init__(self) -> None:
        self.chunks: list[torch.nn.Module] = []
        self.packed: PackedInputs | None = None
        self._run: MixedRun | None = None
        self._mixing: MixingConfig | None = None
        self._building = self._distributed = False
        self._saved: dict[str, Any] | None = None
        self._began_at = (0, 0)
        """Iterations and samples of a checkpoint without a mix, after which this one began."""
        self._losses: SourceLosses | None = None

    # ------------------------------------------------------------------ before there is a model
    def check(self) -> None:
        """Refuse, by flag, what cannot work."""
        args = _args()
        self._mixing = mixing_of(args)
        check_flags(args)
        self._blend, self._valid = blends_of(args)
        check_sources(self._blend.prefixes, args)
        if args.tensor_model_parallel_size > 1 and not self._distributed:
            raise InputError(
                "the script's dataset provider is not marked as distributed, so with tensor parallelism some "
                "ranks would not know the sources; set its attribute is_distributed to True"
            )
        check_mix(self._mixing, self._blend, caps_of(args, self._blend.names), args)
        check_records(args)
        if args.dynmix_source_loss and self.evaluation_is_taken:
            raise InputError(
                "--dynmix-source-loss reports evaluations through pretrain's non_loss_data_func, and this "
                "script gives a process_non_loss_data_func without one; give both, or leave the flag out"
            )

    def model(self, provider: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a script's `model_provider`."""

        @functools.wraps(provider)
        def build(*given: Any, **named: Any) -> Any:
            if self._mixing is None:
                self.check()
            (chunk,) = self.built([provider(*given, **named)])
            return chunk

        return build

    def built(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Take note of chunks of the model; a pre-wrap hook."""
        self.chunks += chunks
        return chunks

    # ------------------------------------------------------------------ data
    def datasets(self, provider: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a script's `train_valid_test_dataset_provider`: its train split becomes an iterator."""
        self._distributed = getattr(provider, "is_distributed", False)

        @functools.wraps(provider)
        def build(sizes: Any, *given: Any, **named: Any) -> Any:
            args = _args()
            self._building = True
            train, valid, test = provider(sizes, *given, **named)
            self._building = False
            if args.skip_train:
                return train, valid, test
            if not isinstance(train, Sources):
                raise InputError(
                    "the script's dataset provider built no blend with BlendedMegatronDatasetBuilder, so "
                    "there is nothing to mix; build the training data with it"
                )
            self._begin(args, train)
            if self.packed is not None:
                self.packed.chunks[named.get("vp_stage") or 0] = train
            iterators = [
                self._evaluating(_stock_iterator(args, split, consumed), train)
                for split, consumed in ((valid, args.consumed_valid_samples), (test, 0))
            ]
            args.dataloader_type = "external"  # stock asks when this has returned
            return self._batches(args, train) if train.loaded else None, *iterators

        return build

    def build(self, stock: Callable[..., Any], builder: Any) -> Any:
        """Build the train split by source; any other blend that is built as stock does."""
        if not self._building or _args().skip_train:
            return stock(builder)
        return train_and_rest(stock, builder, PackedInputs.rows(_args()))

    def _begin(self, args: Namespace, train: Sources) -> None:
        """Make the run, once the sizes of the sources are known."""
        if self._run is not None:  # another virtual stage
            return
        sizes = _told(
            [len(part) for part in train.datasets] if train.loaded else None, len(self._blend.names)
        )
        run = self._run = self._make(args, self._blend, sizes, self._density(args, train))
        run.attach(self.chunks)
        if args.dynmix_packed_rows:
            self.packed = PackedInputs(args, train.datasets, run)
            self.packed.attach(self.chunks)
        if args.dynmix_source_loss:
            self._losses = SourceLosses((self._valid or self._blend).names, self.chunks)
        if self._saved is not None:
            run.load_state_dict(self._saved["run"])
        self._check_place(args)

    def _density(self, args: Namespace, train: Sources) -> dict[str, float] | None:
        """Return the examples of a row of each source, which packed rows know."""
        if not args.dynmix_packed_rows:
            return None
        pairs = zip(self._blend.names, train.datasets, strict=True)
        return {name: rows.mean_examples_per_row for name, rows in pairs}

    def _make(
        self, args: Namespace, blend: Blend, sizes: list[int], density: dict[str, float] | None
    ) -> MixedRun:
        from megatron_dynmix.config.batch_schedule import BatchSchedule, token_steps
        from megatron_dynmix.training.mixed_run import MixedRun

        assert self._mixing is not None, "checked before the model was built"
        if self._saved is not None:
            self._began_at = tuple(self._saved["began_at"])
        else:
            self._began_at = (args.iteration, args.consumed_train_samples)
        iterations, samples = self._began_at
        if steps := value_of(args, "step_batch_size_schedule"):
            pairs = tuple((tokens // args.seq_length, size) for tokens, size in token_steps(steps))
        else:
            ramp = value_of(args, "rampup_batch_size")
            pairs = BatchSchedule.growing(args.global_batch_size, ramp and tuple(map(int, ramp))).steps
        shifted = [(max(start - samples, 0), size) for start, size in pairs]
        return MixedRun.of(
            dict(zip(blend.names, sizes, strict=True)),
            self._mixing,
            train_iters=args.train_iters - iterations,
            batch_sizes=BatchSchedule(tuple(dict(shifted).items())),
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            seed=args.seed,
            weights=None if self._mixing.strategy == "uniform" else blend.first_weights(sizes),
            max_epochs=caps_of(args, blend.names),
            examples_per_row=density if self._mixing.unit == "examples" else None,
            fingerprints=prints_of(blend, args),
            run_dir=args.dynmix_run_dir,
            log_interval=args.log_interval,
        )

    def _check_place(self, args: Namespace) -> None:
        """Refuse a checkpoint whose mix stands elsewhere than its loop; say where a mix begins anew."""
        run, (iterations, samples) = self.run, self._began_at
        place = (run.iteration + iterations, run.consumed_samples + samples)
        if place != (args.iteration, args.consumed_train_samples):
            raise InputError(
                f"the mix of the checkpoint stands at iteration {place[0]} and sample {place[1]}, "
                f"Megatron-LM at iteration {args.iteration} and sample {args.consumed_train_samples}; go on "
                "from a whole checkpoint, or begin a new mix with --finetune"
            )
        if self._saved is None and iterations:
            self._say(
                f"the checkpoint at iteration {iterations} holds no mix: one begins here, and its records "
                "count iterations and samples from here"
            )

    def _batches(self, args: Namespace, train: Sources) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this rank's micro-batches, with the keys that stock knows."""
        from megatron_dynmix import platform

        pin = platform.start().pin_memory
        for batch in self.run.batches(train.datasets, num_workers=args.num_workers, pin_memory=pin):
            yield {name: value for name, value in batch.items() if name not in MARKS}

    # ------------------------------------------------------------------ one step
    def announced(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a script's `forward_step_func`: say whose tokens the pass routes."""
        from megatron.core.utils import get_attr_wrapped_model

        @functools.wraps(forward_step)
        def step(data_iterator: Any, model: Any, *given: Any, **named: Any) -> Any:
            if model.training and self._run is not None:
                chunk = get_attr_wrapped_model(model, "vp_stage") or 0
                self._run.announce(chunk=chunk, rows=None if self.packed is None else self.packed.masks)
            elif self.packed is not None:
                self.packed.evaluate(model, data_iterator)
            return forward_step(data_iterator, model, *given, **named)

        return step

    def train_step(self, stock: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Train one iteration, and reweight where that is due."""
        self.run.begin_step()
        result = stock(*given, **named)
        _, skipped, _, should_exit, _, grad_norm, *_ = result
        # a rerun that ends the job leaves the step undone
        optimizer = given[3] if len(given) > 3 else named["optimizer"]
        self._end_step(
            done=not should_exit,
            applied=not skipped,
            lr=optimizer.param_groups[0]["lr"] if optimizer.param_groups else math.nan,
            grad_norm=math.nan if grad_norm is None else float(grad_norm),
        )
        return result

    def skip_step(self, stock: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Draw the samples of an iteration that is not trained on."""
        self.run.begin_step()
        result = stock(*given, **named)
        self._end_step(done=True, applied=False)
        return result

    def _end_step(self, *, done: bool, **how: Any) -> None:
        from megatron.core import parallel_state
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        from megatron_dynmix.records.logline import mixing_table

        args = _args()
        ranks = parallel_state.get_data_parallel_world_size()
        size = get_num_microbatches() * ranks * args.micro_batch_size
        before = args.consumed_train_samples - self._began_at[1]  # stock's counter grows later
        update = self.run.end_step(before + size if done else before, **how)
        if update is not None:
            self._say(mixing_table(update))
        record = self.run.record
        if self._losses is not None and record is not None and record.iteration == self.run.iteration:
            self._losses.training(record)

    # ------------------------------------------------------------------ checkpoints
    def save(self, stock: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Keep the mix among the saved arguments, in JSON's types: plain Megatron-LM loads them too."""
        if self._run is not None:
            _args().dynmix = {"run": self._run.state_dict(), "began_at": list(self._began_at)}
        return stock(*given, **named)

    def loaded(self, stock: Callable[..., Any], saved: Any, *given: Any, **named: Any) -> Any:
        """Take the mix from a checkpoint that the run goes on from; `--finetune` does not come here."""
        self._saved = getattr(saved, "dynmix", None)
        return stock(saved, *given, **named)

    # ------------------------------------------------------------------ evaluation, and the end
    def evaluated(self, look: Callable[..., Any] | None) -> Callable[..., Any]:
        """Wrap a script's `non_loss_data_func`, which stock calls after each evaluation."""

        def after(model: Sequence[torch.nn.Module]) -> Any:
            if self._losses is not None:
                self._losses.validation(self.run.iteration + self._began_at[0])
            return None if look is None else look(model)

        return after

    def _evaluating(self, batches: Iterator[Any] | None, train: Sources) -> Iterator[Any] | None:
        if batches is None or not train.loaded:
            return batches  # stock does not ask for them there, but `PackedInputs` may
        return _without_marks(batches) if self._losses is None else self._losses.reading(batches)

    def close(self) -> None:
        """Hand the records to the disk, and how the run ended."""
        if self._run is None:
            return
        error = sys.exc_info()[1]
        if isinstance(error, SystemExit) and not error.code:  # its exit interval, duration or signal
            error = StoppedOnRequest("Megatron-LM ended the job before its last iteration")
        self._run.__exit__(None if error is None else type(error), error, None)

    @property
    def run(self) -> MixedRun:
        """The mix."""
        assert self._run is not None, "made with the datasets, before the first step"
        return self._run

    def _say(self, text: str) -> None:
        if torch.distributed.get_rank() == 0:
            print(f" dynmix: {text.strip()}", flush=True)


def _args() -> Namespace:
    from megatron.training import get_args

    args: Namespace = get_args()
    return args


def _told(sizes: list[int] | None, number: int) -> list[int]:
    """Return rank 0's sizes on every rank: those that load nothing plan the order, too."""
    told = torch.zeros(number, dtype=torch.int64, device=torch.cuda.current_device())
    if sizes is not None:
        told += torch.tensor(sizes, device=told.device)
    torch.distributed.broadcast(told, src=0)
    found: list[int] = told.tolist()
    return found


def _stock_iterator(args: Namespace, dataset: Any, consumed: int) -> Iterator[Any] | None:
    from megatron.training.datasets.data_samplers import build_pretraining_data_loader

    kind, args.dataloader_type = args.dataloader_type, "single"
    loader = build_pretraining_data_loader(dataset, consumed)
    args.dataloader_type = kind
    return None if loader is None else iter(loader)


def _without_marks(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield {name: value for name, value in batch.items() if name not in MARKS}
