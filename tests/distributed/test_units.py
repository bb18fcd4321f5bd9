"""Runs whose weights are shares of examples, and runs without packing."""

import json

import numpy as np

from megatron_dynmix.verify.verify import verify
from tests.distributed import programs
from tests.distributed.ranks import run_ranks


def test_weights_in_examples_end_to_end(run_yaml, start_from, tmp_path):
    run_dir = tmp_path / "run"
    flags = [*start_from, "--unit", "examples", "--strategy", "gate-load"]
    result = run_ranks(2, programs.train, run_yaml, flags, run_dir)[0]
    verdict = verify(run_dir)
    assert verdict.failure is None and verdict.updates == 2
    start, *_ = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    per_row_D = np.array(start["resolved"]["examples_per_row"])
    assert len(set(per_row_D)) > 1
    shares_D = np.array(start["weights"]) * per_row_D
    np.testing.assert_allclose(shares_D / shares_D.sum(), np.full(4, 0.25))
    for record in result["mixing"]:
        shares_D = np.array(record["new_weights"]) * per_row_D
        np.testing.assert_allclose(record["example_weights"], shares_D / shares_D.sum())


def test_a_run_without_packing(run_yaml, start_from, tmp_path):
    flags = [*start_from, "--no-packing", "--overlong", "truncate", "--strategy", "fixed"]
    result = run_ranks(2, programs.train, run_yaml, flags, tmp_path)[0]
    assert verify(tmp_path).proven
    assert all(np.isfinite(record["lm_loss"]) for record in result["metrics"])
