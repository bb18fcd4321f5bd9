"""What stock's code does not tell a model of packed rows: which positions are padding, and which may meet.

Legend: B rows of a micro-batch, S positions of a row.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_dynmix.stock.packed import JoinedRows, StockRows, joined_params, mask_of
from megatron_dynmix.stock.sources import Sources

if TYPE_CHECKING:
    from megatron_dynmix.data.blend_plan import Draw
    from megatron_dynmix.training.mixed_run import MixedRun


class PackedInputs:
    """Tells of packed rows where they are padding, and hands GPTModel what the flags ask for."""

    def __init__(self, args: Namespace, datasets: Sequence[StockRows], run: MixedRun) -> None:
        self._args, self._datasets, self._run = args, datasets, run
        self.chunks: dict[int, Sources] = {}
        """By virtual stage: whether stock reads batches there."""
        self._device = torch.device(torch.cuda.current_device())
        self._segment_BS = torch.empty(0)

    @staticmethod
    def rows(args: Namespace) -> type[StockRows] | None:
        """Return the class of the datasets; None for the script's own."""
        if not args.dynmix_packed_rows:
            return None
        return StockRows if args.transformer_impl == "local" else JoinedRows

    def attach(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Look at the arguments of each chunk's forward pass."""
        for chunk in chunks:
            chunk.register_forward_pre_hook(self._complete, with_kwargs=True)

    def masks(self, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `[B, S]` where rows are padding, and where they are trained on; the next pass has them."""
        segments = [self._datasets[source].segments(row) for source, row, _ in draws]
        self._segment_BS = torch.from_numpy(np.stack(segments)).to(self._device)
        padding_BS = self._segment_BS < 0
        if self._run.mix.settings.load_tokens != "trained":
            return padding_BS, ~padding_BS
        rows = [self._datasets[source][row]["loss_mask"] for source, row, _ in draws]
        return padding_BS, torch.from_numpy(np.stack(rows))

    def evaluate(self, model: Any, data_iterator: Any) -> None:
        """Read the validation rows that stock's code does not read for a middle stage."""
        from megatron.core.utils import unwrap_model

        if self._needs_attention(unwrap_model(model)):
            self._segment_BS = next(data_iterator)["segment_ids"].to(self._device)

    def _needs_attention(self, model: Any) -> bool:
        source = self.chunks[getattr(model, "vp_stage", None) or 0]
        middle = not (model.pre_process or model.post_process)
        return bool(self._args.dynmix_packed_attention and middle and not source.loaded)

    def _complete(self, model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Add a padding mask, and for middle stages what stock's code gives to the first and the last."""
        args = self._args
        if args.dynmix_padding_mask and model.training:
            named["padding_mask"] = self._padding(model)
        if self._needs_attention(model):
            if args.transformer_impl == "local":
                mask = mask_of(self._segment_BS)
                given, named = _with_mask(given, named, mask)
            else:
                named["packed_seq_params"] = joined_params(self._segment_BS.cpu().numpy(), self._device)
        return given, named

    def _padding(self, model: Any) -> torch.Tensor:
        """Return `[B, S]`, or where sequence parallelism has cut up the hidden states already, this part."""
        from megatron.core import parallel_state

        padding_BS = self._segment_BS < 0
        if model.pre_process or not self._args.sequence_parallel:  # GPTModel cuts it on the first stage only
            return padding_BS
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        return padding_BS.chunk(ranks, dim=1)[parallel_state.get_tensor_model_parallel_rank()]


def _with_mask(given: tuple[Any, ...], named: dict[str, Any], mask: torch.Tensor) -> Any:
    """Return GPTModel's arguments with an attention mask, its third."""
    if len(given) > 2:
        return (*given[:2], mask, *given[3:]), named
    return given, {**named, "attention_mask": mask}
