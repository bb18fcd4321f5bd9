"""Auxiliary losses and expert bias of one router on one rank, against plain formulas.

Axes: S positions, B rows, T = S * B tokens (index s * B + b), E experts.
"""

import types

import pytest
import torch

from megatron_dynmix import platform
from megatron_dynmix.moe.counter import GateLoadCounter

platform.start()
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dynmix.moe.router import GateLoadRouter, attach_counter  # noqa: E402

S, B, EXPERTS, TOPK = 12, 4, 8, 2
KINDS = ("aux_loss", "seq_aux_loss", "global_aux_loss")
SHARE, COEFFICIENT = 0.25, 0.5


class Alone:
    """A process group of this rank."""

    def size(self):
        return 1

    def rank(self):
        return 0


def router_of(**settings):
    alone = Alone()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        add_bias_linear=False,
        calculate_per_token_loss=True,
        moe_token_dispatcher_type="alltoall",
        **settings,
    )
    groups = types.SimpleNamespace(tp=alone, cp=alone, tp_cp=Alone(), tp_dp_cp=Alone())
    router = GateLoadRouter(config, pg_collection=groups).train()
    router.set_layer_number(1)
    router.counter = GateLoadCounter(1, 1, EXPERTS, torch.device("cpu"))
    router.counter.trained_share = torch.tensor(SHARE)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    return router


def drawn(seed=3):
    """Logits [S, B, E], and padding [S, B] at the end of rows of different lengths."""
    logits_SBE = torch.randn(S, B, EXPERTS, generator=torch.Generator().manual_seed(seed)) * 2
    length_B = torch.tensor([12, 7, 3, 10])
    return logits_SBE, torch.arange(S)[:, None] >= length_B


def gradient(router, micro_batches):
    """The gradient of the auxiliary losses alone, of logits in several micro-batches, in their order."""
    found = []
    for logits_SBE, padding_SB in micro_batches:
        leaf_SBE = logits_SBE.clone().requires_grad_()
        probs_TE, _ = router.routing(leaf_SBE * 1, padding_SB)
        (probs_TE * 0).sum().backward()
        found.append(leaf_SBE.grad)
    return torch.cat(found, dim=1)


def expected(kind, logits_SBE, padding_SB, seen_E=None):
    """`SHARE` x the sum over real tokens of coefficient x E x sum of f p, by the definition."""
    leaf_SBE = logits_SBE.clone().requires_grad_()
    probability_SBE = leaf_SBE.softmax(dim=-1)
    chosen_SBE = torch.zeros_like(leaf_SBE).scatter_(2, leaf_SBE.topk(TOPK, dim=2).indices, 1.0)
    chosen_SBE = chosen_SBE.detach() * ~padding_SB[..., None]
    if kind == "z_loss":
        loss_SB = leaf_SBE.logsumexp(dim=-1) ** 2
    else:
        count_BE = chosen_SBE.sum(dim=0)
        if kind != "seq_aux_loss":
            count_BE = count_BE.sum(dim=0, keepdim=True) + (0 if seen_E is None else seen_E)
        share_BE = count_BE / count_BE.sum(dim=-1, keepdim=True)
        loss_SB = EXPERTS * (share_BE * probability_SBE).sum(dim=-1)
    (SHARE * COEFFICIENT * loss_SB[~padding_SB].sum()).backward()
    return leaf_SBE.grad


def settings_of(kind):
    if kind == "z_loss":
        return {"moe_z_loss_coeff": COEFFICIENT}
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": COEFFICIENT}


@pytest.mark.parametrize("kind", [*KINDS, "z_loss"])
def test_an_auxiliary_loss_is_as_strong_as_its_coefficient_says(kind):
    batch = drawn()
    found_SBE = gradient(router_of(**settings_of(kind)), [batch])
    torch.testing.assert_close(found_SBE, expected(kind, *batch), rtol=1e-5, atol=1e-7)
    assert found_SBE.abs().max() > 1e-3 and not found_SBE[batch[1]].any()


def many():
    """Thousands of tokens, in bfloat16, which counts to 256."""
    logits_SBE, padding_SB = drawn()
    return logits_SBE.bfloat16().repeat(100, 1, 1), padding_SB.repeat(100, 1)


@pytest.mark.parametrize("kind", [*KINDS, "z_loss"])
def test_the_sums_of_a_router_in_bfloat16_are_not(kind):
    logits_SBE, padding_SB = many()
    rough_SBE = gradient(router_of(**settings_of(kind)), [(logits_SBE, padding_SB)])
    exact_SBE = gradient(router_of(**settings_of(kind)), [(logits_SBE.float(), padding_SB)])
    torch.testing.assert_close(rough_SBE.float(), exact_SBE, rtol=0.02, atol=0.01 * exact_SBE.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_sigmoid_scores_in_bfloat16_are_counted_exactly_too(kind):
    router = router_of(**settings_of(kind), moe_router_score_function="sigmoid")
    logits_SBE, padding_SB = many()
    assert gradient(router, [(logits_SBE, padding_SB)]).isfinite().all()
    if kind == "global_aux_loss":
        assert router.global_tokens_per_expert.sum() == TOPK * (~padding_SB).sum()


@pytest.mark.parametrize("kind", ["seq_aux_loss", "z_loss"])
def test_what_is_balanced_by_row_or_token_does_not_depend_on_the_micro_batch(kind):
    logits_SBE, padding_SB = drawn()
    apart = [(logits_SBE[:, [b]], padding_SB[:, [b]]) for b in range(B)]
    found_SBE = gradient(router_of(**settings_of(kind)), apart)
    torch.testing.assert_close(found_SBE, expected(kind, logits_SBE, padding_SB), rtol=1e-5, atol=1e-7)


def test_rows_joined_to_one_sequence_are_balanced_apart():
    logits_SBE, padding_SB = drawn()
    router = router_of(**settings_of("seq_aux_loss"))
    router.joined_row_length = S
    joined = logits_SBE.transpose(0, 1).reshape(-1, 1, EXPERTS), padding_SB.t().reshape(-1, 1)
    found_BSE = gradient(router, [joined]).view(B, S, EXPERTS)
    wanted_SBE = expected("seq_aux_loss", logits_SBE, padding_SB)
    torch.testing.assert_close(found_BSE.transpose(0, 1), wanted_SBE, rtol=1e-5, atol=1e-7)


def test_global_balance_knows_what_the_step_has_routed_and_forgets_it_after_the_step():
    router = router_of(**settings_of("global_aux_loss"))
    first, second = drawn(1), drawn(2)
    for _ in range(2):
        found_SBE = gradient(router, [first, second])[:, B:]
        chosen_SBE = torch.zeros_like(first[0]).scatter_(2, first[0].topk(TOPK, dim=2).indices, 1.0)
        seen_E = (chosen_SBE * ~first[1][..., None]).sum(dim=(0, 1))
        wanted_SBE = expected("global_aux_loss", *second, seen_E)
        torch.testing.assert_close(found_SBE, wanted_SBE, rtol=1e-5, atol=1e-7)
        router.reset_global_aux_loss_tracker()


def test_several_losses_add_up_and_are_tracked_as_means():
    moe_utils.clear_aux_losses_tracker()
    router = router_of(
        moe_router_load_balancing_type=list(KINDS),
        moe_aux_loss_coeff=[COEFFICIENT] * 3,
        moe_z_loss_coeff=COEFFICIENT,
    )
    batch = logits_SBE, padding_SB = drawn()
    wanted_SBE = sum(expected(kind, *batch) for kind in [*KINDS, "z_loss"])
    torch.testing.assert_close(gradient(router, [batch]), wanted_SBE, rtol=1e-5, atol=1e-6)
    mean = (logits_SBE.logsumexp(dim=-1) ** 2)[~padding_SB].mean()
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    torch.testing.assert_close(tracker["z_loss"]["values"][0], mean)
    assert 1 <= tracker["load_balancing_loss"]["values"][0] < 2
    moe_utils.clear_aux_losses_tracker()


def test_nothing_is_added_in_evaluation_nor_counted_for_the_bias():
    router = router_of(
        **settings_of("aux_loss"), moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid"
    ).eval()
    logits_SBE, padding_SB = drawn()
    assert not gradient(router, [(logits_SBE, padding_SB)]).any()
    assert not router.local_tokens_per_expert.any()


BIAS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}


@pytest.mark.parametrize("capacity", [{}, {"moe_expert_capacity_factor": 0.5}])
@pytest.mark.parametrize("rows", [1, 2, B])
def test_expert_bias_counts_choices_of_real_tokens_in_any_micro_batch(rows, capacity):
    router = router_of(**BIAS, **capacity)
    logits_SBE, padding_SB = drawn()
    for first in range(0, B, rows):
        mine = slice(first, first + rows)
        router.routing(logits_SBE[:, mine].clone(), padding_SB[:, mine])
        with torch.no_grad():  # the first pass of a layer that is recomputed
            router.routing(logits_SBE[:, mine].clone(), padding_SB[:, mine])
    chosen_SBE = torch.zeros(S, B, EXPERTS, dtype=torch.int64)
    chosen_SBE.scatter_(2, logits_SBE.topk(TOPK, dim=2).indices, 1)
    counted_E = router.local_tokens_per_expert
    assert counted_E.dtype == torch.int64
    assert counted_E.tolist() == (chosen_SBE * ~padding_SB[..., None]).sum(dim=(0, 1)).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_of_expert_bias_stay_exact_in_half_precision(dtype):
    router = router_of(**BIAS).to(dtype)
    many_SBE = torch.zeros(1, 13_579, EXPERTS)
    many_SBE[..., :TOPK] = 1
    for _ in range(3):
        router.routing(many_SBE, torch.zeros(1, 13_579, dtype=torch.bool))
    assert router.local_tokens_per_expert.tolist() == [3 * 13_579] * TOPK + [0] * (EXPERTS - TOPK)


@pytest.mark.parametrize("least", [12, 2**24, 2**40])
def test_an_expert_bias_moves_by_the_sign_of_an_exact_difference(least, monkeypatch):
    from megatron_dynmix.platform import megatron_patches

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        megatron_patches.parallel_state, "get_tensor_and_data_parallel_group", lambda **kwargs: None
    )
    tokens_LE = torch.tensor([[least, least + 1, least - 1, least], [least] * 4])
    bias_LE = torch.tensor([[0.5, 0.5, -0.25, 0.0], [0.1] * 4])
    moved_LE = megatron_patches._updated_expert_bias(tokens_LE, bias_LE, 1e-3)
    assert moved_LE.dtype == torch.float32
    assert moved_LE.equal(bias_LE + torch.tensor([[0, -1e-3, 1e-3, 0], [0.0] * 4]))
    assert megatron_patches._updated_expert_bias(tokens_LE, bias_LE, 0.0).equal(bias_LE)


class LoRATopKRouter(torch.nn.Module):
    """Takes a router's place as Megatron-Bridge's of this name does: the router's own forward never runs."""

    def __init__(self, to_wrap):
        super().__init__()
        self.to_wrap = to_wrap
        self.adapter = torch.nn.Linear(to_wrap.weight.shape[1], EXPERTS, bias=False)

    def forward(self, hidden, *given):
        return self.to_wrap.routing(self.to_wrap.gating(hidden) + self.adapter(hidden), *given)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "with LoRA"])
def test_what_a_router_chooses_is_counted_once_whether_it_or_a_wrapper_is_called(wrapped):
    router = router_of()
    model = torch.nn.ModuleDict({"router": LoRATopKRouter(router) if wrapped else router})
    counter = GateLoadCounter(1, 1, EXPERTS, torch.device("cpu"))
    attach_counter([model], counter, [0])
    hidden_SBW = torch.randn(S, B, 16, generator=torch.Generator().manual_seed(0))
    source_T = torch.zeros(S * B, dtype=torch.long)
    with counter.recording():
        counter.set_sources(source_T, source_T, source_T == 0)
        _, chosen_TE = model["router"](hidden_SBW)
    assert counter.counts_HDLE[0, 0, 0].tolist() == chosen_TE.sum(dim=0).tolist()
    assert counter.counts_HDLE.sum() == S * B * TOPK
