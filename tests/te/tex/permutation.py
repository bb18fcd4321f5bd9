"""In the place of Transformer Engine's Triton kernels that bring tokens into the order of experts.

A `row_id_map` has, for each token, the rows that it goes to and then the experts of these; the last column is
how many there are. Axes: T tokens, E experts, R rows, H hidden size.
"""

import torch


def make_row_id_map(routing_map, num_tokens, num_experts):
    assert routing_map.shape == (num_tokens, num_experts)
    row_TE = (routing_map.t().reshape(-1) != 0).cumsum(dim=0).view(num_experts, num_tokens).t() - 1
    map_ = torch.full((num_tokens, 2 * num_experts + 1), -1, dtype=torch.int32)
    for token in range(num_tokens):
        (expert,) = torch.nonzero(routing_map[token], as_tuple=True)
        expert = expert.flip(0)
        count = len(expert)
        map_[token, :count] = row_TE[token, expert].int()
        map_[token, num_experts : num_experts + count] = expert.int()
        map_[token, -1] = count
    return map_


def _pairs(row_id_map, num_experts):
    """Row, token and expert of each copy of a token."""
    used = torch.arange(num_experts) < row_id_map[:, -1:]
    token, place = torch.nonzero(used, as_tuple=True)
    return row_id_map[token, place].long(), token, row_id_map[token, num_experts + place].long()


def permute_with_mask_map(
    inp, row_id_map, probs, scale, num_tokens, num_experts, num_out_tokens, hidden_size, scale_hidden_dim
):
    assert scale is None
    row, token, expert = _pairs(row_id_map, num_experts)
    output = inp.new_empty((num_out_tokens, hidden_size))
    output[row] = inp[token]
    if probs is None:
        return output, None, None
    permuted = probs.new_empty(num_out_tokens)
    permuted[row] = probs[token, expert]
    return output, None, permuted


def unpermute_with_mask_map(
    inp, row_id_map, merging_probs, permuted_probs, num_tokens, num_experts, hidden_size
):
    row, token, expert = _pairs(row_id_map, num_experts)
    value = inp[row].float()
    if merging_probs is not None:
        value = value * merging_probs[token, expert].float()[:, None]
    output = torch.zeros(num_tokens, hidden_size).index_add_(0, token, value).to(inp.dtype)
    if permuted_probs is None:
        return output, None
    probs = permuted_probs.new_zeros((num_tokens, num_experts))
    probs[token, expert] = permuted_probs[row]
    return output, probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad,
    row_id_map,
    fwd_input,
    merging_probs,
    num_tokens,
    num_experts,
    num_out_tokens,
    hidden_size,
):
    row, token, expert = _pairs(row_id_map, num_experts)
    grad = fwd_output_grad[token].float()
    act_grad = fwd_output_grad.new_zeros((num_out_tokens, hidden_size))
    act_grad[row] = (grad * merging_probs[token, expert].float()[:, None]).to(act_grad.dtype)
    probs_grad = torch.zeros_like(merging_probs)
    probs_grad[token, expert] = (grad * fwd_input[row].float()).sum(dim=-1).to(probs_grad.dtype)
    return act_grad, probs_grad


def make_chunk_sort_map(split_sizes, sorted_indices, num_tokens, num_splits):
    """Row of the output that each row of the input goes to."""
    ids = torch.arange(num_tokens).split(split_sizes.tolist())
    taken = torch.cat([ids[chunk] for chunk in sorted_indices.tolist()])
    goes_to = torch.empty(num_tokens, dtype=torch.int32)
    goes_to[taken] = torch.arange(num_tokens, dtype=torch.int32)
    return goes_to


def sort_chunks_by_map(inp, row_id_map, probs, num_tokens, hidden_size, is_forward):
    goes_to = row_id_map.long()
    taken = torch.argsort(goes_to) if is_forward else goes_to
    return inp[taken], None if probs is None else probs[taken]
