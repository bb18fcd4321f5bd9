"""Counting on one device. Axes: D sources, L MoE layers, E experts, T tokens."""

import pytest
import torch

from megatron_dynmix import platform
from megatron_dynmix.moe.counter import GateLoadCounter

platform.start()
from megatron_dynmix.moe.router import ChoiceBeforeDropping  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def counter():
    return GateLoadCounter(num_sources=3, num_layers=2, num_experts=4, device=CPU)


def routing_map_TE(choices):
    chosen = torch.zeros(len(choices), 4, dtype=torch.bool)
    for token, experts in enumerate(choices):
        chosen[token, experts] = True
    return chosen


def test_tokens_are_counted_by_source_layer_and_expert(counter):
    with counter.recording():
        counter.set_sources(torch.tensor([0, 2, 2, -1]))
        counter.add(0, routing_map_TE([[0, 1], [1, 2], [1, 3], [0, 1]]))
        counter.add(1, routing_map_TE([[3, 2], [0, 1], [0, 2], [0, 1]]))
    assert counter.counts_LDE.tolist() == [
        [[1, 1, 0, 0], [0, 0, 0, 0], [0, 2, 1, 1]],
        [[0, 0, 1, 1], [0, 0, 0, 0], [2, 1, 1, 0]],
    ]


def test_I6_padding_is_counted_nowhere(counter):
    with counter.recording():
        counter.set_sources(torch.full((5,), -1))
        counter.add(0, torch.ones(5, 4, dtype=torch.bool))
    assert not counter.counts_LDE.any()


def test_take_starts_again_from_zero(counter):
    with counter.recording():
        counter.set_sources(torch.tensor([1]))
        counter.add(0, routing_map_TE([[2]]))
    assert counter.take().sum() == 1
    assert counter.take().sum() == 0


def test_counts_are_exact_where_floats_would_round(counter):
    counter.counts_LDE += 2**40
    with counter.recording():
        counter.set_sources(torch.tensor([0]))
        counter.add(0, routing_map_TE([[0]]))
    assert counter.counts_LDE[0, 0, 0] == 2**40 + 1


def test_nothing_is_recorded_outside_recording(counter):
    assert not counter.is_recording
    with counter.recording():
        assert counter.is_recording
    assert not counter.is_recording


def test_another_number_of_tokens_than_announced_is_our_fault(counter):
    with counter.recording():
        counter.set_sources(torch.tensor([0, 1]))
        with pytest.raises(AssertionError, match="differ in number"):
            counter.add(0, torch.ones(3, 4, dtype=torch.bool))


def test_padding_of_the_announced_micro_batch_is_known_without_recording(counter):
    counter.set_sources(torch.tensor([0, -1, 2]))
    assert counter.padding_T.tolist() == [False, True, False]
    with counter.recording(), pytest.raises(AssertionError, match="set_sources was not called"):
        counter.add(0, torch.ones(3, 4, dtype=torch.bool))


def test_the_choice_before_dropping_is_what_was_chosen():
    choice = ChoiceBeforeDropping()
    scores_TE = torch.tensor([[0.1, 0.9, 0.5, 0.0], [0.7, 0.1, 0.0, 0.6]])

    def choose(scores_TE, topk, num_groups, group_topk):
        return torch.topk(scores_TE, topk, dim=1)

    scores_TK, experts_TK = choice.get_replay_topk(scores_TE, 2, None, None, choose)
    assert experts_TK.tolist() == [[1, 2], [0, 3]]
    assert scores_TK.equal(scores_TE.gather(1, experts_TK))
    assert choice.take_map_TE(4).tolist() == [[False, True, True, False], [True, False, False, True]]
    with pytest.raises(AssertionError, match="the fused router makes none here"):
        choice.take_map_TE(4)
