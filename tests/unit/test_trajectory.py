"""How weights moved, in numbers that can be counted by hand."""

import numpy as np
import pytest

from megatron_dynmix.mixing.trajectory import exchanged, motion


def test_weights_that_never_move():
    still = motion([0, 10, 20], [[0.5, 0.5]] * 3)
    assert (still.settled, still.turns, still.path, still.net) == (0, 0, 0.0, 0.0)


def test_a_straight_way_settles_where_the_rest_is_near_the_end():
    moved = motion([0, 10, 20, 30], [[0.5, 0.5], [0.6, 0.4], [0.695, 0.305], [0.7, 0.3]])
    assert moved.settled == 20 and moved.turns == 0
    assert moved.path == pytest.approx(0.2) == moved.net


def test_a_way_there_and_back_turns_and_is_longer_than_it_leads():
    moved = motion([0, 1, 2, 3, 4], [[0.5, 0.5], [0.6, 0.4], [0.5, 0.5], [0.6, 0.4], [0.5, 0.5]])
    assert moved.turns == 3 and moved.settled == 4
    assert moved.path == pytest.approx(0.4) and moved.net == 0


def test_jitter_is_no_turn_but_a_slow_way_back_is_one():
    step = 4e-4
    jitter = 0.5 + step * np.array([0, 1, 0, 1, 0, 1])
    slow = 0.5 + step * np.array([0, 3, 6, 5, 4, 3, 2])
    for way, turns in ((jitter, 0), (slow, 1)):
        assert motion(range(len(way)), np.stack([way, 1 - way], axis=1)).turns == turns


def test_the_share_exchanged_is_one_between_mixes_that_have_nothing_in_common():
    assert exchanged(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1
    assert exchanged(np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])) == 0.25
