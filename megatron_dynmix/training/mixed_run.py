"""A run whose mix changes, in a training loop that is nobody's: the loop says when, this says what.

Axes: D sources, B rows of a micro-batch, S positions of a row, C of them on this context-parallel rank.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.utils import get_model_config

from megatron_dynmix import platform
from megatron_dynmix.checkpoint.run_state import LoopState
from megatron_dynmix.config.batch_schedule import BatchSchedule
from megatron_dynmix.config.megatron_fields import moe_layers
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.data.blend_plan import BlendPlan, Draw
from megatron_dynmix.data.loader import BlendLoader, MicroBatch
from megatron_dynmix.data.source_set import Prints
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.errors import InputError
from megatron_dynmix.job.agreement import RankFailure, together
from megatron_dynmix.model.positions import context_parallel_positions
from megatron_dynmix.moe.counter import GateLoadCounter
from megatron_dynmix.moe.router import attach_counter, in_backward, router_token_slice
from megatron_dynmix.records.schema import MixingUpdate, TrainingRecord, plain
from megatron_dynmix.records.writer import MetricsWriter, recorded
from megatron_dynmix.training.loop_settings import BySource, check_layers, check_step, mix_of
from megatron_dynmix.training.mix import Mix
from megatron_dynmix.training.mixed_steps import MixedSteps
from megatron_dynmix.training.reweighting import told_first_weights
from megatron_dynmix.training.step import reduce_sums, sums_by_source

STATE_VERSION = 1
RowMasks = Callable[[Sequence[Draw]], tuple[torch.Tensor, torch.Tensor]]
"""From draws to `[B, S]` where whole rows are padding, and where their labels are trained on."""


class MixedRun(MixedSteps):
    """Decides which rows each step of a loop draws, and changes the mix as the run goes on.

    Every rank makes the same calls in the same order; only `announce`, `observe` and reading a micro-batch
    wait for no other rank. The samples of a step do not depend on the layout.
    """

    @classmethod
    def of(
        cls,
        sizes: Mapping[str, int],
        mixing: MixingConfig | Mapping[str, Any] | None = None,
        *,
        train_iters: int,
        batch_sizes: int | BatchSchedule,
        micro_batch_size: int,
        seq_length: int,
        seed: int,
        weights: BySource | None = None,
        max_epochs: BySource | None = None,
        examples_per_row: BySource | None = None,
        fingerprints: Mapping[str, Sequence[str]] | None = None,
        run_dir: Path | str | None = None,
        log_interval: int = 1,
    ) -> MixedRun:
        """Begin a run, once the process groups of Megatron-Core are there; `attach` comes next.

        Args:
            sizes: rows of an epoch by source; their order numbers the sources.
            mixing: settings as in the mixing section of RUN.yaml; gate loads are measured while training.
            train_iters: iterations of the whole run.
            batch_sizes: samples of a step, of all ranks; or a `BatchSchedule` if they grow.
            micro_batch_size: rows of a micro-batch.
            seq_length: positions of a row.
            seed: decides the order of the rows.
            weights: first shares, to be scaled to a sum of 1; uniform if there are none.
            max_epochs: of sources that are drawn no more after so many epochs.
            examples_per_row: of every source, on average, for `unit: examples`.
            fingerprints: what the rows of each source follow from, to tell when they are others.
            run_dir: where the records of the run are written, and an override.json is read.
            log_interval: iterations of one record.

        Raises:
            InputError: (a ValueError) something cannot be; the message says what, why, and what can.

        """
        mix = mix_of(
            sizes,
            mixing or {},
            train_iters=train_iters,
            batch_sizes=batch_sizes,
            seed=seed,
            weights=weights,
            max_epochs=max_epochs,
            examples_per_row=examples_per_row,
        )
        folder = None if run_dir is None else Path(run_dir)
        return cls(
            mix,
            prints=fingerprints or {name: [f"{size} rows"] for name, size in sizes.items()},
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            run_dir=folder,
            log_interval=log_interval,
        )

    def __init__(
        self,
        mix: Mix,
        *,
        prints: Prints,
        seq_length: int,
        micro_batch_size: int,
        run_dir: Path | None,
        log_interval: int,
    ) -> None:
        """Begin a run; `of` is the way to make its mix."""
        check_step(mix.horizon.schedule, micro_batch_size, log_interval)
        here, horizon, settings = platform.start(), mix.horizon, mix.settings
        plan = BlendPlan(
            horizon.size_D,
            told_first_weights(mix, here.device),
            names=mix.controller.sources,
            seed=horizon.seed,
            chunk_size=settings.interval * max(size for _, size in horizon.schedule.steps),
        )
        override = settings.override_file or (run_dir and run_dir / "override.json")
        super().__init__(
            mix,
            plan,
            prints=prints,
            seq_length=seq_length,
            here=here,
            override_file=None if override is None else Path(override),
        )
        self.record: TrainingRecord | None = None
        """Of the last log interval."""
        self._micro_batch_size, self._run_dir, self._log_interval = micro_batch_size, run_dir, log_interval
        self._records = ExitStack()
        self._writer: MetricsWriter | None = None
        self._resumed = self._sequence_parallel = False
        self._passes: dict[int, int] = {}
        """Model chunk -> micro-batches announced in the pass under way."""
        self._source_BC = torch.empty(0)
        self._sums_3D = torch.zeros(3, len(self.sources), dtype=torch.float64, device=here.device)
        """What this rank saw in the step under way, see `SourceStats`."""
        self._read: list[MicroBatch] = []
        """Which rows were read in it."""
        self._begun, self._start, self._readers = 0, 0.0, 0

    def attach(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """Count what the routers of this rank's model chunks choose, and its losses, by hooks on them.

        The chunks may be wrapped, as by DDP. Any `TopKRouter` will do. Losses are those that a `GPTModel`
        makes of `labels`, over its `loss_mask` if it is given one; a loop that makes its own calls `observe`.
        """
        if self._reweighting is not None:
            raise InputError(
                "attach was called before: the model's tokens would be counted twice; call it once"
            )
        config = get_model_config(model_chunks[0])
        layers, settings = moe_layers(config), self.mix.settings
        check_layers(self.mix, layers)
        counter = GateLoadCounter(
            len(self.sources),
            len(layers),
            config.num_moe_experts or 1,
            self._here.device,
            trained_only=settings.load_tokens == "trained",
            by_probability=settings.load_mass == "probability",
        )
        attach_counter(model_chunks, counter, layers)
        self.count_with(counter)
        self._sequence_parallel = config.sequence_parallel
        for chunk in model_chunks:
            for module in chunk.modules():
                if isinstance(module, LanguageModule) and getattr(module, "post_process", False):
                    see = partial(self._see_losses, inspect.signature(module.forward))
                    module.register_forward_hook(see, with_kwargs=True)

    @property
    def iteration(self) -> int:
        """Iterations done, skipped ones too."""
        return self.progress.iteration

    @property
    def consumed_samples(self) -> int:
        """Samples of the iterations done."""
        return self.progress.consumed_samples

    @property
    def weights(self) -> dict[str, float]:
        """The shares of the rows in force, by source."""
        return dict(zip(self.sources, self.plan.weights_D.tolist(), strict=True))

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each rank in the step that comes or is under way."""
        ranks = parallel_state.get_data_parallel_world_size()
        return self.batch_size // (self._micro_batch_size * ranks)

    def batches(
        self, datasets: Sequence[Any], *, num_workers: int = 0, pin_memory: bool = False
    ) -> Iterator[MicroBatch]:
        """Return an endless iterator over this rank's micro-batches, to be read inside steps.

        `datasets[d][row]` is a mapping of arrays; a micro-batch holds them stacked, and `dataset_id`, `row`
        and `half` `[B]` beside them. Ranks that load nothing need not call it; where several model chunks
        load, each has an iterator of its own.
        """
        lengths = list(map(len, datasets))
        if lengths != self.plan.sizes_D.tolist():
            raise InputError(
                f"the datasets have {lengths} rows, but the run was begun with {self.plan.sizes_D.tolist()}; "
                "give them in the order of the sources, and begin with their lengths"
            )
        loader = BlendLoader(
            self.plan,
            datasets,
            micro_batch_size=self._micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self._readers += 1
        return self._batches(loader, folded=self._readers == 1)

    def _batches(self, loader: BlendLoader, *, folded: bool) -> Iterator[MicroBatch]:
        step = 0
        while True:
            self._need_step("a micro-batch was read")
            if step == self._begun:
                raise InputError(
                    f"more than the {self.num_micro_batches} micro-batches of a rank's step were read; call "
                    "end_step after the last, and read no further before the next begin_step"
                )
            step, consumed = self._begun, self.consumed_samples
            for micro_batch in loader.step(consumed, self.num_micro_batches, self.first_undecided_sample):
                if folded:
                    self._read.append({name: micro_batch[name] for name in ("dataset_id", "row")})
                yield micro_batch
                if step != self._begun:  # the pass was repeated, or the loop left the step
                    break

    def begin_step(self) -> None:
        """Begin a step; called again before its end, the pass is repeated, and what it counted forgotten."""
        if self._reweighting is None:
            raise InputError("no model is attached, so nothing could be counted; call attach first")
        self._open_records()
        if self._before_HDLE is None:
            super().begin_step()
            self.plan.advance_to(self.consumed_samples)
        self.roll_back()
        self._passes, self._read, self._begun = {}, [], self._begun + 1
        self._start = time.perf_counter()

    def roll_back(self) -> None:
        """Forget what was counted since the step began."""
        super().roll_back()
        self._sums_3D.zero_()

    @property
    def in_step(self) -> bool:
        """Whether a step was begun and has not ended."""
        return self._before_HDLE is not None

    def pause(self) -> None:
        """Count no more until the next `begin_step`: the passes are over, the step is yet to be counted."""
        self.reweighting.counter.is_recording = False

    def announce(
        self, *, chunk: int = 0, rows: RowMasks | None = None, positions_C: torch.Tensor | None = None
    ) -> list[Draw]:
        """Say that the next micro-batch is about to pass through a model chunk; return its draws.

        It is called before every forward pass of a step, in order, whether this rank has the rows or not. If
        all of a step were announced and it begins again, the pass is repeated, and counts once. `rows` is
        asked what the rows that were drawn hold, where there is padding, which is counted nowhere, or where
        only trained labels count. `positions_C` are those of this context-parallel rank, if it has others
        than Megatron-Core's `get_batch_on_this_cp_rank` gives it.
        """
        self._need_step("announce was called")
        number = self._passes.get(chunk, 0) % self.num_micro_batches
        if number == chunk == 0:
            self.roll_back()
        self._passes[chunk] = number + 1
        draws = self._draws(number)
        drawn_B3 = torch.tensor(draws, device=self._here.device)
        shape = (len(draws), self._seq_length)
        source_BS, half_BS = (drawn_B3[:, part, None].expand(shape) for part in (0, 2))
        trained_BS = torch.ones(shape, dtype=torch.bool, device=self._here.device)
        if rows is not None:
            padding_BS, trained_BS = (mask.to(self._here.device).bool() for mask in rows(draws))
            if not padding_BS.shape == trained_BS.shape == shape:
                raise InputError(
                    f"rows gave masks of {list(padding_BS.shape)} and {list(trained_BS.shape)} positions; "
                    f"they must be those of whole rows, {list(shape)}"
                )
            source_BS = source_BS.masked_fill(padding_BS, -1)
        elif self.mix.settings.load_tokens == "trained":
            raise InputError("mixing.load_tokens is trained: announce needs rows, to say what is trained on")
        if positions_C is None:
            ranks = parallel_state.get_context_parallel_world_size()
            mine = parallel_state.get_context_parallel_rank()
            positions_C = context_parallel_positions(self._seq_length, ranks, self._here.device)[mine]
        self._source_BC = source_BS[:, positions_C]
        self.reweighting.counter.set_sources(
            *(
                router_token_slice(it_BC.t(), self._sequence_parallel)
                for it_BC in (self._source_BC, half_BS[:, positions_C], trained_BS[:, positions_C])
            )
        )
        last_stage = parallel_state.get_pipeline_model_parallel_world_size() - 1
        if chunk == 0 and parallel_state.get_pipeline_model_parallel_rank() == last_stage:
            ones_BC = torch.ones_like(self._source_BC)
            self._sums_3D[2] += sums_by_source(ones_BC, ones_BC, self._source_BC, len(self.sources))[2]
        return draws

    def _draws(self, number: int) -> list[Draw]:
        """Return the draws of this rank's micro-batch of that number, from 0, of the step."""
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        first = self.consumed_samples + (number * ranks + rank) * self._micro_batch_size
        return self.plan.draws(first, first + self._micro_batch_size)

    def observe(self, loss_BC: torch.Tensor, loss_mask_BC: torch.Tensor | None = None) -> None:
        """Take note of token losses of the announced micro-batch; without a mask, of all that are real."""
        self._need_step("observe was called")
        mask_BC = self._source_BC >= 0 if loss_mask_BC is None else loss_mask_BC
        if not loss_BC.numel() == mask_BC.numel() == self._source_BC.numel():
            raise InputError(
                f"{loss_BC.numel()} losses and a mask of {mask_BC.numel()} were given for a micro-batch of "
                f"{self._source_BC.numel()} positions on this rank; give one of each position"
            )
        mask_T = mask_BC.detach().float().reshape(-1)
        masked_T = loss_BC.detach().float().reshape(-1) * mask_T
        self._sums_3D[:2] += sums_by_source(masked_T, mask_T, self._source_BC, len(self.sources))[:2]

    def _see_losses(
        self,
        signature: inspect.Signature,
        model: LanguageModule,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
    ) -> None:
        if not model.training or in_backward() or not self.in_step:
            return
        given = signature.bind(*inputs, **named).arguments
        if given.get("labels") is not None:
            self.observe(output, given.get("loss_mask"))

    def end_step(
        self,
        consumed_samples: int | None = None,
        *,
        applied: bool = True,
        lr: float = math.nan,
        grad_norm: float = math.nan,
    ) -> MixingUpdate | None:
        """Count the step as done, and change the mix if that is due; return the record of the change.

        Only rank 0's record says how it was decided; the weights are the same bits on every rank.
        `consumed_samples` is what the loop's own count says after the step: if it has not moved, the step
        will be trained again, and nothing of it counts. Not `applied`: the loop has skipped the batch, or the
        optimizer left the weights alone; the samples are spent, and what was counted is forgotten, as it is
        if losses are not finite. `lr` and `grad_norm` are for the records.

        Raises:
            InputError: (a ValueError) no step was begun, or it was not a whole one.
            MixingError: new weights could not be made.

        """
        self._need_step("end_step was called")
        before, size, expected = self.consumed_samples, self.batch_size, self.num_micro_batches
        if consumed_samples == before:
            self.roll_back()
            self.leave_step()
            return None
        if consumed_samples not in (None, before + size):
            raise InputError(
                f"the loop has consumed {consumed_samples} samples after a step that began at {before}, but "
                f"its batch has {size}; give batch_sizes as the loop has them"
            )
        whole = set(self._passes.values()) == {expected} and len(self._read) in (0, expected)
        if applied and not whole:
            announced = sorted(self._passes.values()) or [0]
            raise InputError(
                f"the step ends after {announced[0]} micro-batches announced and {len(self._read)} read, but "
                f"it has {expected} on each rank; announce each before its forward pass, or end it with "
                "applied=False"
            )
        stats = SourceStats(*reduce_sums(self._sums_3D).cpu())
        trained = applied and bool(torch.isfinite(stats.loss_sum_D).all())
        if not trained:
            self.roll_back()
        self.interval.seconds += time.perf_counter() - self._start
        read = self._read if len(self._read) == expected else self._planned()
        self.advance(read, stats if trained else None)
        return self._record(lr, grad_norm)

    def _planned(self) -> list[MicroBatch]:
        """Return which rows this rank's micro-batches of the step are, where none were read."""
        drawn = [torch.tensor(self._draws(number)).t() for number in range(self.num_micro_batches)]
        return [{"dataset_id": dataset_id, "row": row} for dataset_id, row, _ in drawn]

    def _record(self, lr: float, grad_norm: float) -> MixingUpdate | None:
        """Put the step on record where that is due; reweight where that is."""
        writer = self._writer
        if self.iteration % self._log_interval == 0 or self.iteration == self.mix.horizon.train_iters:
            self.record, line = self.close_interval(lr=lr, grad_norm=grad_norm, aux_losses={})
            if writer is not None:
                writer.training(self.record)
                writer.ledger(line)
        update = self.reweight()
        if update is not None and writer is not None:
            writer.ledger(self.stage_line("update", self.iteration))
            writer.mixing(update)
            writer.flush()
        return update

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint is to hold, in JSON's own types, the same on every rank.

        Every rank has to ask for it. With a step under way it is the state before that step, which is left.
        """
        if self._reweighting is None:
            raise InputError("no model is attached, so there is no state yet; call attach first")
        if self._before_HDLE is not None:
            self.roll_back()
            self.leave_step()
        state = {"version": STATE_VERSION, "fingerprints": plain(self._prints), **self.state.to_json()}
        told = [state]
        torch.distributed.broadcast_object_list(told, src=0)
        return told[0]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, on any layout and any number of ranks, before the first step.

        Raises:
            InputError: (a ValueError) it is of other sources, of another seed or model, or no such state.

        """
        if self._reweighting is None:
            raise InputError("no model is attached, so no state can be taken up; call attach first")
        if self._begun:
            raise InputError("a step was begun already; load the state before the first begin_step")
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            raise InputError(f"{state!r:.80} is no state of a MixedRun; give what state_dict returned")
        saved, now = state["fingerprints"], plain(self._prints)
        if list(saved.items()) != list(now.items()):
            raise InputError(
                f"the state is of the sources {saved}, but the run has {now}; go on with the same ones, in "
                "the same order, or begin a new run"
            )
        loaded = LoopState.from_json(state)
        shape = tuple(self.reweighting.counter.counts_HDLE.shape)
        if loaded.mix.interval_counts.shape != shape:
            raise InputError(
                f"the state counts {loaded.mix.interval_counts.shape} halves, sources, MoE layers, experts "
                f"and the model has {shape}; go on with the same model, or begin a new run"
            )
        self.resume(loaded)
        self._resumed = True

    def _open_records(self) -> None:
        """Begin to write, on rank 0; what was recorded after the state that the run goes on from is cut."""
        if self._run_dir is None or self._begun:
            return
        try:
            with together():
                if torch.distributed.get_rank() == 0:
                    self._run_dir.mkdir(parents=True, exist_ok=True)
                    at = self.iteration if self._resumed else None
                    self._writer = MetricsWriter(self._run_dir, resume_iteration=at)
                    self._records.callback(self._writer.close)
        except RankFailure as failure:
            raise InputError(str(failure)) from None
        self._records.enter_context(
            recorded(self._run_dir, lambda: self.iteration, resumed=self._resumed, notes=[])
        )
        if self._writer is not None and not self._resumed:
            self._writer.ledger(self.stage_line("start", 0))

    def close(self) -> None:
        """Hand the records to the disk; the run has ended."""
        self.__exit__(None, None, None)

    def __enter__(self) -> MixedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._records.__exit__(kind, error, trace)

    def _need_step(self, what: str) -> None:
        if not self.in_step:
            raise InputError(f"{what} outside a step; call begin_step first, once for each step")
