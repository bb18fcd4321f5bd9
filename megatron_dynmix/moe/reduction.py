"""From each rank's counts to the counts of the whole job.

Every rank of a pipeline stage routes other tokens: expert-parallel ranks are carved out of the
data-parallel ones, and with sequence or context parallelism a rank holds a slice of the sequence. The
sum therefore runs over the expert-parallel group, then over the expert-tensor and expert-data groups
(which together hold each token of the stage once, in every layout), then over the pipeline stages,
whose layers are disjoint. Axes: L MoE layers, H halves, D sources, E experts.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state


def reduce_counts(counts_LHDE: torch.Tensor) -> torch.Tensor:
    """Sum counts over all tokens of the job and all pipeline stages.

    Args:
        counts_LHDE: this rank's int64 counts; zero for the layers of other stages.

    Returns:
        The same counts on every rank, exact: integers are added, in any order.

    """
    total_LHDE = counts_LHDE.clone()
    if not total_LHDE.numel():  # of a dense model
        return total_LHDE
    for group in (
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_data_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        if group.size() > 1:
            torch.distributed.all_reduce(total_LHDE, group=group)
    return total_LHDE
