"""Counting on one device. Axes: D sources, L MoE layers, H halves, E experts, T tokens."""

import numpy as np
import pytest
import torch

from megatron_dynmix import platform
from megatron_dynmix.moe.counter import PROBABILITY_UNIT, GateLoadCounter

platform.start()
from megatron_dynmix.moe.router import ChoiceBeforeDropping  # noqa: E402

CPU = torch.device("cpu")


def counter_of(**options):
    return GateLoadCounter(num_sources=3, num_layers=2, num_experts=4, device=CPU, **options)


@pytest.fixture
def counter():
    return counter_of()


def announce(counter, source, half=None, trained=None):
    source_T = torch.tensor(source)
    half_T = torch.zeros_like(source_T) if half is None else torch.tensor(half)
    trained_T = source_T >= 0 if trained is None else torch.tensor(trained)
    counter.set_sources(source_T, half_T, trained_T)


def routing_map_TE(choices):
    chosen = torch.zeros(len(choices), 4, dtype=torch.bool)
    for token, experts in enumerate(choices):
        chosen[token, experts] = True
    return chosen


def test_tokens_are_counted_by_source_layer_and_expert(counter):
    with counter.recording():
        announce(counter, [0, 2, 2, -1])
        counter.add(0, routing_map_TE([[0, 1], [1, 2], [1, 3], [0, 1]]))
        counter.add(1, routing_map_TE([[3, 2], [0, 1], [0, 2], [0, 1]]))
    assert counter.counts_HDLE.sum(dim=0).transpose(0, 1).tolist() == [
        [[1, 1, 0, 0], [0, 0, 0, 0], [0, 2, 1, 1]],
        [[0, 0, 1, 1], [0, 0, 0, 0], [2, 1, 1, 0]],
    ]


def test_even_and_odd_rows_of_a_source_are_counted_apart(counter):
    with counter.recording():
        announce(counter, [0, 0, 2, -1], half=[0, 1, 1, 1])
        counter.add(1, routing_map_TE([[0], [1], [2], [3]]))
    half_counts_HDLE = counter.as_signal(counter.take())
    assert half_counts_HDLE.dtype == np.int64 and half_counts_HDLE.shape == (2, 3, 2, 4)
    assert half_counts_HDLE[:, :, 1].tolist() == [
        [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]],
    ]
    assert not half_counts_HDLE[:, :, 0].any()


def test_trained_only_leaves_out_the_other_tokens_but_knows_the_padding():
    counter = counter_of(trained_only=True)
    with counter.recording():
        announce(counter, [0, 0, 1, -1], trained=[False, True, True, False])
        counter.add(0, routing_map_TE([[0], [1], [2], [3]]))
    assert counter.counts_HDLE[:, :, 0].sum(dim=0).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert counter.padding_T.tolist() == [False, False, False, True]


def test_by_probability_a_token_counts_the_weights_of_its_experts():
    counter = counter_of(by_probability=True)
    probs_TE = torch.tensor([[0.75, 0.25, 0.0, 0.0], [0.5, 0.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.0]])
    with counter.recording():
        announce(counter, [1, 1, -1], half=[0, 1, 0])
        counter.add(0, probs_TE.requires_grad_())
    half_counts_HDLE = counter.as_signal(counter.take())
    assert half_counts_HDLE.dtype == np.float64
    assert half_counts_HDLE[:, 1, 0].tolist() == [[0.75, 0.25, 0, 0], [0.5, 0, 0, 0.5]]
    assert half_counts_HDLE.sum() == 2


def test_sums_of_probabilities_do_not_depend_on_the_order_they_are_added_in():
    probs_TE = torch.rand(1000, 4, generator=torch.Generator().manual_seed(5))
    forth, back, parts = (counter_of(by_probability=True) for _ in range(3))
    for counter, order_T in ((forth, range(1000)), (back, range(999, -1, -1))):
        with counter.recording():
            announce(counter, [0] * 1000)
            counter.add(0, probs_TE[list(order_T)])
    with parts.recording():
        for token in range(1000):
            announce(parts, [0])
            parts.add(0, probs_TE[token : token + 1])
    assert forth.counts_HDLE.equal(back.counts_HDLE) and forth.counts_HDLE.equal(parts.counts_HDLE)
    exact_E = probs_TE.double().sum(dim=0).numpy()
    np.testing.assert_allclose(forth.as_signal(forth.take())[0, 0, 0], exact_E, atol=1000 / PROBABILITY_UNIT)


def test_I6_padding_is_counted_nowhere(counter):
    with counter.recording():
        announce(counter, [-1] * 5, half=[1] * 5, trained=[True] * 5)
        counter.add(0, torch.ones(5, 4, dtype=torch.bool))
    assert not counter.counts_HDLE.any()


def test_take_starts_again_from_zero(counter):
    with counter.recording():
        announce(counter, [1])
        counter.add(0, routing_map_TE([[2]]))
    assert counter.take().sum() == 1
    assert counter.take().sum() == 0


def test_counts_are_exact_where_floats_would_round(counter):
    counter.counts_HDLE += 2**40
    with counter.recording():
        announce(counter, [0], half=[1])
        counter.add(0, routing_map_TE([[0]]))
    assert counter.counts_HDLE[1, 0, 0, 0] == 2**40 + 1


def test_a_dense_model_has_nothing_to_count():
    counter = GateLoadCounter(num_sources=3, num_layers=0, num_experts=1, device=CPU)
    with counter.recording():
        announce(counter, [0, 2])
    assert counter.as_signal(counter.take()).shape == (2, 3, 0, 1)


def test_nothing_is_recorded_outside_recording(counter):
    assert not counter.is_recording
    with counter.recording():
        assert counter.is_recording
    assert not counter.is_recording


def test_another_number_of_tokens_than_announced_is_our_fault(counter):
    with counter.recording():
        announce(counter, [0, 1])
        with pytest.raises(AssertionError, match="differ in number"):
            counter.add(0, torch.ones(3, 4, dtype=torch.bool))


def test_padding_of_the_announced_micro_batch_is_known_without_recording(counter):
    announce(counter, [0, -1, 2])
    assert counter.padding_T.tolist() == [False, True, False]
    with counter.recording(), pytest.raises(AssertionError, match="set_sources was not called"):
        counter.add(0, torch.ones(3, 4, dtype=torch.bool))


def test_the_choice_before_dropping_is_what_was_chosen():
    choice = ChoiceBeforeDropping()
    scores_TE = torch.tensor([[0.1, 0.9, 0.5, 0.0], [0.7, 0.1, 0.0, 0.6]])

    def choose(scores_TE, topk, num_groups, group_topk):
        return torch.topk(scores_TE, topk, dim=1)

    with pytest.raises(AssertionError, match="the fused router makes none here"):
        choice.map_TE(4)
    scores_TK, experts_TK = choice.get_replay_topk(scores_TE, 2, None, None, choose)
    assert experts_TK.tolist() == [[1, 2], [0, 3]]
    assert scores_TK.equal(scores_TE.gather(1, experts_TK))
    for _ in ("gate loads", "expert bias"):
        assert choice.map_TE(4).tolist() == [[False, True, True, False], [True, False, False, True]]
