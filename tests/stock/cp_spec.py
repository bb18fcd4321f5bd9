"""A fork's own layer spec, `--spec tests.stock.cp_spec layer_spec`: attention that runs in parts on a CPU."""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_dynmix.model.layers import SegmentAttention, segment_mask


class PartAttention(SegmentAttention):
    """Causal attention of the two parts of a row that each context-parallel rank has."""

    def forward(self, query, key, value, attention_mask, **others):
        ranks, rank = (
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )
        parts = torch.arange(query.shape[0] * ranks).chunk(2 * ranks)
        held = [torch.cat([parts[r], parts[-1 - r]]) for r in range(ranks)]
        one_segment = torch.zeros(query.shape[1], query.shape[0] * ranks, dtype=torch.int64)
        mask = segment_mask(one_segment, held[rank], torch.cat(held))
        return super().forward(query, key, value, mask, **others)


layer_spec = get_gpt_layer_local_spec(8, False)
layer_spec.submodules.self_attention.submodules.core_attention = PartAttention
