"""Gradients of auxiliary losses alone, and of the main loss alone, measured and compared with one rank."""

import numpy as np
import pytest

from megatron_dynmix.training.step import PassRunner
from tests.distributed import layouts, programs
from tests.distributed.conftest import SMALL, quick_or_slow
from tests.distributed.layouts import CP2, ETP1, PP2, TP2, VPP2, assert_same_gradients, ep, full
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.newest


def balanced(kind):
    return ["--moe-router-load-balancing-type", kind, "--moe-aux-loss-coeff", "1"]


CASES = {
    "main loss": ["--moe-aux-loss-coeff", "0"],
    **{kind: balanced(kind) for kind in ("aux_loss", "seq_aux_loss", "global_aux_loss")},
    "z_loss": ["--moe-aux-loss-coeff", "0", "--moe-z-loss-coeff", "1"],
}
LAYOUTS = {
    "TP2, ETP1": (2, [*TP2, *ETP1, *ep(1)]),
    "CP2 x TP2, ETP1": (4, [*CP2, *TP2, *ETP1, *ep(1)]),
    "CP2 x TP2 x EP2, ETP1": (4, [*CP2, *TP2, *ETP1, *ep(2)]),
    "DP2, ETP2": (2, ["--expert-tensor-parallel-size", "2", *ep(1)]),
    "CP2, ETP2": (2, [*CP2, "--expert-tensor-parallel-size", "2", *ep(1)]),
    "DP2": (2, ep(1)),
    "PP2 VPP2, full recompute": (2, [*VPP2, *ep(1), *full("uniform", 1)]),
    "PP2 x TP2, ETP1, no distributed optimizer": (
        4,
        [*PP2, *TP2, *ETP1, *ep(1), "--no-use-distributed-optimizer"],
    ),
    "TP2, ETP1, overlapped reduction": (2, [*TP2, *ETP1, *ep(1), "--overlap-grad-reduce"]),
}
QUICK = {"TP2, ETP1"}
BY_ORDER = {"global_aux_loss"}
"""Balanced over what a step has routed so far: with other data-parallel ranks that is something else."""


def gradients(run_yaml, flags, run_dir, cases, train_on=("all",)):
    """(case, train_on) -> gradients of the case's loss alone."""
    answers = {}
    loss_of = PassRunner._loss
    for case in cases:
        for name in train_on if case != "main loss" else ("all",):
            layouts.start_anew()
            trainer = programs.build(run_yaml, [*flags, *CASES[case]], run_dir / f"{case} {name}")
            programs.reduce_gradients_whole(trainer.run.chunks)
            batches = trainer.loader.step(0, programs.training_run_num_micro_batches())
            if name == "everything":
                for batch in batches:
                    batch["loss_mask"] = (~batch["padding_mask"].bool()).float()
            factor = float(case == "main loss")
            PassRunner._loss = lambda self, loss, batch, factor=factor: loss_of(self, loss * factor, batch)
            trainer.run(batches, forward_only=False)
            answers[case, name] = programs.gradients_of(trainer.run.chunks)
    PassRunner._loss = loss_of
    return answers


@pytest.fixture(scope="module")
def begin(run_yaml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("initial")
    flags = [*SMALL, "--num-layers", "4"]
    run_ranks(1, programs.save_initial_weights, run_yaml, [*flags, *ep(1)], folder)
    return [*flags, "--pretrained-checkpoint", str(folder / "checkpoints")]


@pytest.fixture(scope="module")
def one_rank(run_yaml, begin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(1, gradients, run_yaml, [*begin, *ep(1)], folder, list(CASES), ("all", "everything"))[0]


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"main loss"}))
def test_an_auxiliary_loss_is_as_strong_whatever_is_trained_on(case, one_rank):
    answers, everything = one_rank[case, "all"], one_rank[case, "everything"]
    assert max(np.abs(gradient).max() for _, _, gradient in answers) > 1e-3
    assert_same_gradients([answers], everything)


@pytest.mark.parametrize("layout", quick_or_slow(LAYOUTS, QUICK))
def test_gradients_of_every_loss_are_those_of_one_rank(layout, run_yaml, begin, one_rank, tmp_path):
    ranks, flags = LAYOUTS[layout]
    cases = [case for case in CASES if case not in BY_ORDER or not layout.startswith("DP")]
    found = run_ranks(ranks, gradients, run_yaml, [*begin, *flags], tmp_path, cases)
    for case in cases:
        assert_same_gradients([rank[case, "all"] for rank in found], one_rank[case, "all"])
