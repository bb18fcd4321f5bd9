"""The fused router: choice of experts and balance loss.

Axes: T tokens, E experts, K experts of a token.
"""

import torch

TINY = 1e-20


def _scores(logits_TE, score_function):
    x = logits_TE.float()
    return x.softmax(dim=-1) if score_function == "softmax" else x.sigmoid()


def _in_best_groups(score_TE, num_groups, group_topk, topk):
    """Scores, with those of all but the best groups out of the way."""
    grouped = score_TE.unflatten(-1, (num_groups, -1))
    group_TG = grouped.topk(topk // group_topk, dim=-1).values.sum(dim=-1)
    best_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    best_TG.scatter_(1, group_TG.topk(group_topk, dim=-1).indices, True)
    return grouped.masked_fill(~best_TG[..., None], float("-inf")).flatten(start_dim=-2)


def fused_topk_with_score_function_fwd(
    logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias
):
    assert logits.dim() == 2 and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert expert_bias is None or score_function == "sigmoid", "a bias goes with sigmoid only"
    before = score_function == "sigmoid" or use_pre_softmax
    score_TE = _scores(logits, score_function) if before else logits.float()
    ranked_TE = score_TE if expert_bias is None else score_TE + expert_bias
    if num_groups is not None and num_groups > 0:
        ranked_TE = _in_best_groups(ranked_TE, num_groups, group_topk, topk)
    choice_TK = ranked_TE.topk(topk, dim=-1).indices
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, choice_TK, True)
    probs_TE = _weights(score_TE, chosen_TE, topk, before, score_function) * (scaling_factor or 1.0)
    return probs_TE.to(logits.dtype), chosen_TE, logits.float()


def _weights(score_TE, chosen_TE, topk, before, score_function):
    if not before:
        return score_TE.masked_fill(~chosen_TE, float("-inf")).softmax(dim=-1)
    kept_TE = score_TE * chosen_TE
    if score_function == "sigmoid" and topk > 1:
        return kept_TE / (kept_TE.sum(dim=-1, keepdim=True) + TINY)
    return kept_TE


def fused_topk_with_score_function_bwd(
    num_tokens,
    num_experts,
    routing_map,
    intermediate_output,
    grad_probs,
    topk,
    use_pre_softmax,
    scaling_factor,
    score_function,
):
    before = score_function == "sigmoid" or use_pre_softmax
    with torch.enable_grad():
        logits = intermediate_output.detach().requires_grad_()
        score_TE = _scores(logits, score_function) if before else logits
        probs = _weights(score_TE, routing_map, topk, before, score_function) * (scaling_factor or 1.0)
    return torch.autograd.grad(probs, logits, grad_probs.float())[0].to(grad_probs.dtype)


def _shares(logits, topk, score_function):
    score_TE = _scores(logits, score_function)
    if score_function == "sigmoid" and topk > 1:
        return score_TE / (score_TE.sum(dim=-1, keepdim=True) + TINY)
    return score_TE


def fused_score_for_moe_aux_loss_fwd(logits, topk, score_function):
    share_TE = _shares(logits, topk, score_function)
    choice_TK = share_TE.topk(topk, dim=-1).indices
    return share_TE, torch.zeros_like(share_TE, dtype=torch.bool).scatter(1, choice_TK, True), logits.float()


def fused_score_for_moe_aux_loss_bwd(
    num_tokens, num_experts, intermediate_output, grad_scores, topk, score_function
):
    with torch.enable_grad():
        logits = intermediate_output.detach().requires_grad_()
        share_TE = _shares(logits, topk, score_function)
    return torch.autograd.grad(share_TE, logits, grad_scores.float())[0].to(grad_scores.dtype)


def fused_moe_aux_loss_fwd(
    probs, tokens_per_expert, total_num_tokens, num_experts, num_rows, num_cols, topk, coeff
):
    factor = num_experts * coeff / (topk * total_num_tokens * total_num_tokens)
    loss = (probs.float().sum(dim=0) * tokens_per_expert.float()).sum() * factor
    return loss.to(probs.dtype), torch.as_tensor(float(factor))


def fused_moe_aux_loss_bwd(Const_buf, tokens_per_expert, num_rows, num_cols, grad_aux_loss):
    row = tokens_per_expert.float() * Const_buf * grad_aux_loss.float()
    return row.expand(num_rows, num_cols).contiguous().to(grad_aux_loss.dtype)
