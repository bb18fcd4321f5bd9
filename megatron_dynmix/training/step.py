"""One pass over the micro-batches of a step through Megatron-Core's schedules, and whether it may be used.

Axes: D sources, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import (
    get_num_microbatches,
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker, track_moe_metrics
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmix.config import RunConfig
from megatron_dynmix.data.loader import PADDING, MicroBatch, pinned
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.model.gpt import scales_kept, whole_parameters
from megatron_dynmix.moe.balance import aux_losses
from megatron_dynmix.moe.counter import GateLoadCounter
from megatron_dynmix.platform import Platform
from megatron_dynmix.training.batch import Batch, to_batch

MOST_SKIPPED = 10
"""So many batches in a row that are not finite are no accident of the rows: the run stops."""


@dataclass(frozen=True, kw_only=True)
class PassRunner:
    """Runs forward (and backward) passes of one model and sums what they saw, per source."""

    chunks: list[DistributedDataParallel]
    """This rank's part of the model: one chunk for each virtual pipeline stage."""
    platform: Platform
    counter: GateLoadCounter
    seq_length: int
    sequence_parallel: bool
    join_rows: bool
    """See `host.joins_rows`."""
    micro_batch_group: int = 1
    """The interleaved pipeline runs micro-batches in groups of so many."""

    def __call__(self, micro_batches: Sequence[MicroBatch], *, forward_only: bool) -> SourceStats:
        """Run one pass over this rank's micro-batches; return sums over all ranks, on the CPU.

        Every rank has the same number of them; to evaluate (`forward_only`), any number will do. Otherwise
        gradients of the step's loss, summed over all trained tokens and divided by their number, are left in
        the model's buffers.
        """
        return SourceStats(*self._pass(micro_batches, forward_only=forward_only).cpu())

    def train(
        self, micro_batches: Sequence[MicroBatch], *, stop: Callable[[], bool]
    ) -> tuple[SourceStats, bool, bool]:
        """Run a pass that leaves gradients, and ask what is to be done with them: all in one transfer.

        Return the sums, whether losses and gradients are finite on every rank, and whether any rank is to
        `stop`, asked after the pass; the same answers everywhere.
        """
        sums_3D = self._pass(micro_batches, forward_only=False)
        asked = bad_and_stopping(self.chunks, stop=stop())
        answers = torch.cat([sums_3D.flatten(), asked.double()]).cpu()
        stats = SourceStats(*answers[:-2].view_as(sums_3D))
        bad, stopping = answers[-2:].bool().tolist()
        return stats, not bad and bool(stats.loss_sum_D.isfinite().all()), stopping

    def _pass(self, micro_batches: Sequence[MicroBatch], *, forward_only: bool) -> torch.Tensor:
        """Return `[3, D]`, the fields of `SourceStats`, on the device."""
        rows = len(micro_batches[0]["dataset_id"])
        if forward_only:
            short = -len(micro_batches) % self.micro_batch_group
            micro_batches = [*micro_batches, *[_padding_like(micro_batches[0])] * short]
        elif aux_losses(self.chunks[0].config):
            self.counter.trained_share = self._trained_share(micro_batches)
        iterators = [iter(micro_batches) for _ in self.chunks]
        interleaved = len(self.chunks) > 1
        with contextlib.ExitStack() as only_measured:
            if forward_only:
                only_measured.enter_context(whole_parameters(self.chunks))
                only_measured.enter_context(scales_kept(self.chunks))
            reports = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iterators if interleaved else iterators[0],
                model=self.chunks if interleaved else self.chunks[0],
                num_microbatches=len(micro_batches),
                seq_length=self.seq_length * rows if self.join_rows else self.seq_length,
                micro_batch_size=1 if self.join_rows else rows,
                forward_only=forward_only,
            )
        return self._reduce([report["source_stats"] for report in reports])

    def most_segments(self, rows: Sequence[PackedRows]) -> int | None:
        """Return the segments that a row of these sources can have, where attention is told of them."""
        return max(source.packed.most_segments for source in rows) if self.join_rows else None

    def _trained_share(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Return trained tokens / real tokens of the step, before any of its gradients is made."""
        trained = sum(int(batch["loss_mask"].sum()) for batch in micro_batches)
        real = sum(int((~batch["padding_mask"].bool()).sum()) for batch in micro_batches)
        # filled on the device: a tensor made here would have to wait for its copy
        both = torch.stack([torch.full((), sum_, device=self.platform.device) for sum_ in (trained, real)])
        torch.distributed.all_reduce(both, group=parallel_state.get_data_parallel_group())
        return both[0] / both[1].clamp(min=1)

    def _forward_step(
        self, micro_batches: Iterator[MicroBatch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = to_batch(next(micro_batches), self.platform.device, join_rows=self.join_rows)
        self.counter.set_sources(*batch.routed_T(self.sequence_parallel))
        return batch.token_losses(model), lambda token_loss: self._loss(token_loss, batch)

    def _loss(
        self, token_loss: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the sum of the trained tokens' losses, their number, and both per source.

        Megatron-Core divides by the number over the whole global batch, so micro-batch size, data
        parallelism and packing do not change the loss.
        """
        weighted = token_loss.float() * batch.loss_mask
        sums_3D = sums_by_source(weighted.detach(), batch.loss_mask, batch.source, self.counter.num_sources)
        report = {"source_stats": sums_3D}
        return weighted.sum(), batch.loss_mask.sum().to(torch.int), report

    def _reduce(self, stats_3D: list[torch.Tensor]) -> torch.Tensor:
        """Sum over micro-batches and over ranks."""
        total = torch.zeros(3, self.counter.num_sources, dtype=torch.float64, device=self.platform.device)
        for stats in stats_3D:
            total += stats
        return reduce_sums(total)


def sums_by_source(
    loss: torch.Tensor, loss_mask: torch.Tensor, source: torch.Tensor, num_sources: int
) -> torch.Tensor:
    """Return `[3, D]`, the fields of `SourceStats`, of tokens with these (masked) losses; -1 is padding."""
    sources = torch.arange(num_sources, device=loss.device)
    one_hot_DT = (sources[:, None] == source.reshape(1, -1)).double()
    seen_T3 = torch.stack([loss, loss_mask, torch.ones_like(loss_mask)], dim=-1).reshape(-1, 3)
    return (one_hot_DT @ seen_T3.double()).t()


def reduce_sums(sums_3D: torch.Tensor) -> torch.Tensor:
    """Sum over data-parallel ranks of the last stage, then tell the other stages, which have none."""
    total_3D = sums_3D.clone()
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for group in (data, parallel_state.get_pipeline_model_parallel_group()):
        if group.size() > 1:
            torch.distributed.all_reduce(total_3D, group=group)
    return total_3D


def _padding_like(micro_batch: MicroBatch) -> MicroBatch:
    """Make a micro-batch of the same shape that is all padding."""
    padding = {name: torch.full_like(tensor, PADDING.get(name, 0)) for name, tensor in micro_batch.items()}
    if "cu_seqlens" in padding:  # each row is one segment
        rows, length = padding["tokens"].shape
        borders = torch.arange(len(padding["cu_seqlens"]), dtype=torch.int32) * length
        padding["cu_seqlens"] = borders.clamp(max=rows * length)
    return pinned(padding) if micro_batch["tokens"].is_pinned() else padding


def set_batch_size(config: RunConfig, batch_size: int) -> int:
    """Tell Megatron-Core the samples of the steps to come; return the micro-batches of each rank."""
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(
        rank=torch.distributed.get_rank(),
        rampup_batch_size=None,  # nor does it know of steps: the schedule is ours
        global_batch_size=batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    return int(get_num_microbatches())


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank; the same answer on every rank."""
    flags = torch.full((), float(flag), device=device)
    torch.distributed.all_reduce(flags)
    return bool(flags.item())


def bad_and_stopping(chunks: list[DistributedDataParallel], *, stop: bool) -> torch.Tensor:
    """Return two numbers: 0 if no rank holds a gradient that is NaN or infinite, 0 if none is to stop.

    The same on every rank, by one all-reduce, and on the device.
    """
    bad_stop = torch.zeros(2, device=next(chunks[0].parameters()).device)
    for chunk in chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            # its extremes: the sum of finite gradients may be infinite, and that of infinite ones NaN or not
            bad_stop[0] += ~torch.stack(buffer.grad_data.aminmax()).isfinite().all()
    bad_stop[1].fill_(float(stop))  # an assignment would copy the number and wait
    torch.distributed.all_reduce(bad_stop)
    return bad_stop


class BeforePass:
    """The model's buffers (expert bias) and the tracked auxiliary losses before a pass."""

    def __init__(self, run: PassRunner) -> None:
        self._run = run
        self._before = {name: tensor.clone() for name, tensor in self._changing().items()}

    def restore(self) -> None:
        """Make them what they were; a loss first tracked in this pass goes back to zero."""
        for name, tensor in self._changing().items():
            tensor.copy_(self._before.get(name, torch.zeros_like(tensor)))

    def _changing(self) -> dict[str, torch.Tensor]:
        changing: dict[str, torch.Tensor] = {}
        for index, chunk in enumerate(self._run.chunks):
            changing |= {f"buffer {index} {name}": buffer for name, buffer in chunk.named_buffers()}
        tracker = get_moe_layer_wise_logging_tracker()
        return changing | {f"aux loss {name}": tracked["values"] for name, tracked in tracker.items()}


def take_aux_losses(config: TransformerConfig, micro_batches: int) -> dict[str, float]:
    """Return mean auxiliary losses by name, over MoE layers, ranks and the micro-batches since the last call.

    Each rank has run so many micro-batches. Without any such loss the answer is empty.
    """
    names = list(aux_losses(config))
    if not names:
        return {}
    losses: dict[str, torch.Tensor] = {}
    track_moe_metrics(
        1.0 / micro_batches,
        iteration=0,
        total_loss_dict=losses,
        force_initialize=True,
        track_names=names,
        num_layers=config.num_layers,
        moe_layer_freq=config.moe_layer_freq,
    )
    return {name: float(loss) for name, loss in losses.items()}
