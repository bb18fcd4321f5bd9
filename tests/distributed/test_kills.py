"""A run that is killed again and again goes on each time, and ends as if nothing had been."""

import pytest

from tests.distributed import kills

pytestmark = pytest.mark.alone


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], id="save", marks=pytest.mark.slow),
        pytest.param(["--async-save"], id="async save", marks=pytest.mark.slow),
    ],
)
def test_I11_a_run_killed_at_random_instants_ends_like_one_that_was_not(extra, run_yaml, tmp_path):
    flags = kills.settings(24, *extra)
    expected, seconds = kills.undisturbed(run_yaml, flags, tmp_path / "undisturbed")
    killer = kills.Killer(run_yaml, flags, tmp_path / "killed", kills=4, span=seconds, seed=7, overlaps=2)
    result = killer.finish()
    assert kills.differences(result, expected) == []
    print(f"kills: {dict(killer.phases)}, resumed: {killer.resumed}, trained again: {killer.lost}")
    assert killer.second_starts == {"waited": 1, "refused": 1}
    assert sum(killer.phases.values()) >= 2, "the run was done too early to be killed"
