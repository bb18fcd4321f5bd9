"""What balances a router's experts: losses whose coefficients mean the same in every layout.

A token t with probabilities p_te has the balance loss E * sum over e of f_ge * p_te, where f_ge is the share
of choices that went to expert e in a group g of tokens around t: its micro-batch (`aux_loss`), its row
(`seq_aux_loss`), or what the step has routed so far on all ranks (`global_aux_loss`). Even routing makes
it 1.

A step minimizes the mean loss of its trained tokens plus, for each layer, coefficient x the mean balance loss
of its real tokens, all but padding. Megatron-Core's gradient depends on more: it grows with real / trained
tokens, and shrinks with the ranks that share a group and with the rows of a micro-batch.

Axes: T tokens of this rank's micro-batch, E experts, G groups.
Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6; for rows DeepSeek-V3 (arXiv 2412.19437),
equations 17 to 20; for a step Qiu et al. 2025 (arXiv 2501.11873).
"""

from __future__ import annotations

from typing import Any

import torch

TRACKED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Kind of balancing -> the name under which Megatron-Core tracks its loss."""


def balancing(settings: Any) -> list[tuple[str, float]]:
    """Return the kinds of balancing with their coefficients.

    The settings are a `TransformerConfig`, or have its fields.
    """
    kinds, coefficients = settings.moe_router_load_balancing_type, settings.moe_aux_loss_coeff
    return [(kinds, coefficients)] if isinstance(kinds, str) else list(zip(kinds, coefficients, strict=True))


def aux_losses(settings: Any) -> dict[str, float]:
    """Return the coefficient of each auxiliary loss in the gradient, by the name it is tracked under."""
    if not settings.num_moe_experts:
        return {}
    found = {TRACKED[kind]: number for kind, number in balancing(settings) if kind in TRACKED and number}
    z_loss = settings.moe_z_loss_coeff
    return found if z_loss is None else {**found, "z_loss": z_loss}


def count_choices(
    chosen_TE: torch.Tensor, in_group_GT: torch.Tensor, ranks: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Return `[G, E]`, the choices of all `ranks` in each group, as int64: exact, whoever adds first.

    `chosen_TE` is bool and False for padding, `in_group_GT` is 1 where a token belongs to a group.
    """
    # float32 holds sums of ones up to 2^24 tokens of one micro-batch
    count_GE = (in_group_GT @ chosen_TE.to(in_group_GT.dtype)).to(torch.int64)
    if ranks.size() > 1:
        torch.distributed.all_reduce(count_GE, group=ranks)
    return count_GE


def balance_loss_sum(
    probability_TE: torch.Tensor, count_GE: torch.Tensor, in_group_GT: torch.Tensor
) -> torch.Tensor:
    """Return the sum of this rank's tokens' balance losses; the probabilities of padding are 0.

    `count_GE` are the choices of whole groups, of which this rank may hold a part.
    """
    share_GE = count_GE / count_GE.sum(dim=-1, keepdim=True).clamp(min=1)
    return count_GE.shape[-1] * (share_GE * (in_group_GT @ probability_TE)).sum()
