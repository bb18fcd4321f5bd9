"""Whole runs with Transformer Engine, gone on with and without it."""

import numpy as np
import pytest

from tests.distributed import programs as plain_programs
from tests.distributed.layouts import ep
from tests.distributed.ranks import run_ranks
from tests.te import programs
from tests.te.conftest import run_plain

pytestmark = pytest.mark.slow
LONG, SHORT = ["--train-iters", "4", "--lr-decay-iters", "4"], ["--train-iters", "2", "--lr-decay-iters", "4"]


def _losses(answers):
    return [record["lm_loss"] for record in answers["metrics"]]


def test_checkpoints_go_on_with_and_without_it(run_yaml, plain_start, tmp_path):
    """What was trained half-way with it goes on without, and the other way round, as if nothing changed."""
    flags = [*plain_start, *ep(1)]
    (whole,) = run_plain(1, plain_programs.train, run_yaml, [*flags, *LONG], tmp_path / "whole")
    with_it, without = (
        lambda *args, **options: run_ranks(1, programs.train, *args, **options),
        lambda *args, **options: run_plain(1, plain_programs.train, *args, **options),
    )
    for name, first, then in (("to", with_it, without), ("from", without, with_it)):
        first(run_yaml, [*flags, *SHORT], tmp_path / name)
        (resumed,) = then(run_yaml, [*flags, *LONG], tmp_path / name, resume="must")
        np.testing.assert_allclose(_losses(resumed), _losses(whole), rtol=1e-4)
        for router, weights in whole["routers"].items():
            np.testing.assert_allclose(resumed["routers"][router], weights, rtol=0, atol=1e-4)
