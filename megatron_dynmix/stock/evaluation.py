"""Losses by source, of training and of validation, printed beside stock's own and on its TensorBoard.

Axes: D sources, B rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron_dynmix.records.schema import TrainingRecord


class SourceLosses:
    """Sums what the last stage's model says of each validation row, and reports both kinds of losses."""

    def __init__(self, names: Sequence[str], chunks: Sequence[torch.nn.Module]) -> None:
        self._names = list(names)
        device = torch.cuda.current_device()
        self._sums_2D = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        self._ids_B: torch.Tensor | None = None
        for chunk in chunks:
            if getattr(chunk, "post_process", False):
                chunk.register_forward_hook(self._add, with_kwargs=True)

    def reading(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield stock's validation batches without their dataset_id, and remember that."""
        for batch in batches:
            batch = dict(batch)
            self._ids_B = batch.pop("dataset_id", torch.zeros(len(batch["tokens"]), dtype=torch.int64))
            yield batch

    def _add(self, model: Any, given: Any, named: Mapping[str, Any], loss_BS: Any) -> None:
        # Only the rank that reads for its tensor-parallel group knows whose rows these are, and its loss is
        # that of the group.
        if model.training or self._ids_B is None or named.get("labels") is None:
            return
        mask_BS = named["loss_mask"] if named.get("loss_mask") is not None else torch.ones_like(loss_BS)
        mask_BS = mask_BS.view_as(loss_BS)
        seen_2B = torch.stack([(loss_BS.detach().float() * mask_BS).sum(1), mask_BS.float().sum(1)]).double()
        self._sums_2D.index_add_(1, self._ids_B.long().to(seen_2B.device), seen_2B)

    def validation(self, iteration: int) -> None:
        """Report an evaluation that has just ended, and begin the next; every rank has to ask for it."""
        torch.distributed.all_reduce(self._sums_2D)
        sums = zip(self._names, *self._sums_2D.tolist(), strict=True)
        self._sums_2D.zero_()
        _report("validation", {name: total / tokens for name, total, tokens in sums if tokens}, iteration)

    def training(self, record: TrainingRecord) -> None:
        """Report a log interval."""
        known = {name: loss for name, loss in record.source_loss.items() if loss is not None}
        _report("training", known, record.iteration)


def _report(kind: str, losses: Mapping[str, float], iteration: int) -> None:
    from megatron.training import get_tensorboard_writer

    if torch.distributed.get_rank() == 0:
        said = " | ".join(f"{name} {loss:.6E}" for name, loss in losses.items())
        print(f" dynmix: {kind} loss by source at iteration {iteration}: {said}", flush=True)
    if writer := get_tensorboard_writer():
        for name, loss in losses.items():
            writer.add_scalar(f"dynmix/{kind}-lm-loss/{name}", loss, iteration)
