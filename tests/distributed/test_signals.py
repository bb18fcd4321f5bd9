"""What gate loads can be made of, in other layouts, against what one rank's routers chose.

The oracle hooks the routers of one rank and reads the micro-batches itself: it shares no line with the
counter. Axes: L MoE layers, H halves, D sources, E experts, T tokens.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dynmix.config.load import load_config
from megatron_dynmix.config.megatron import moe_layers
from megatron_dynmix.errors import InputError
from megatron_dynmix.model.gpt import unwrap
from megatron_dynmix.moe.counter import GateLoadCounter, reduce_counts
from megatron_dynmix.moe.router import GateLoadRouter, attach_counter
from megatron_dynmix.training.probe import Probe
from megatron_dynmix.training.resume import check_resume
from tests.distributed import layouts, programs
from tests.distributed.conftest import SMALL, quick_or_slow
from tests.distributed.layouts import CP2, ETP1, PP2, TP2, ep, full
from tests.distributed.ranks import run_ranks

LAYERS, HALVES, SOURCES, EXPERTS = 2, 2, 4, 8
SCALE = 2.5
FLAGS = [
    *SMALL,
    *("--num-layers", str(LAYERS), "--probe-tokens", "256", "--lr", "1e-3"),
    *("--moe-router-score-function", "sigmoid", "--moe-router-topk-scaling-factor", str(SCALE)),
]
KINDS = {
    "all": {},
    "trained": {"trained_only": True},
    "probability": {"by_probability": True},
    "trained probability": {"trained_only": True, "by_probability": True},
}
LAYOUTS = {
    "EP2": (2, ep(2)),
    "TP2 x EP2, full recompute": (2, [*TP2, *ETP1, *ep(2), *full("uniform", 1)]),
    "PP2, full recompute": (2, [*PP2, *ep(1), *full("block", 1)]),
    "CP2": (2, [*CP2, *ep(1)]),
}


def loads_of_every_kind(run_yaml, flags, run_dir):
    """Kind -> (one training pass, one probe) as `[H, D, L, E]`; and the oracle's of the training pass."""
    trainer = programs.build(run_yaml, flags, run_dir)
    batches = trainer.loader.step(0, programs.training_run_num_micro_batches())
    probe = trainer.mixed.reweighting.probe
    answers = {}
    for kind, options in KINDS.items():
        counter = GateLoadCounter(SOURCES, LAYERS, EXPERTS, torch.device("cpu"), **options)
        attach_counter(trainer.run.chunks, counter, moe_layers(trainer.run.chunks[0].config))
        run = probe.run = replace(trainer.run, counter=counter)
        with counter.recording():
            run(batches, forward_only=False)
        step_HDLE = counter.as_signal(reduce_counts(counter.take()))
        answers[kind] = step_HDLE, counter.as_signal(probe.measure({}, 0)[0])
    return answers, _oracle(trainer, batches) if torch.distributed.get_world_size() == 1 else None


def _routers(trainer):
    modules = [module for chunk in trainer.run.chunks for module in unwrap(chunk).modules()]
    return [module for module in modules if isinstance(module, GateLoadRouter)]


def _oracle(trainer, batches):
    """Kind -> loads of a training pass `[H, D, L, E]`, token by token."""
    seen = []
    layers = moe_layers(trainer.run.chunks[0].config)
    hooks = [
        router.register_forward_hook(
            lambda module, _, output: seen.append((layers.index(module.layer_number - 1), output))
        )
        for router in _routers(trainer)
    ]
    answers = {kind: np.zeros((HALVES, SOURCES, LAYERS, EXPERTS)) for kind in KINDS}
    for batch in batches:
        seen.clear()
        trainer.run([batch], forward_only=False)
        real_T = ~batch["padding_mask"].bool().t().reshape(-1)
        trained_T = batch["loss_mask"].t().reshape(-1) > 0
        rows = len(batch["dataset_id"])
        for layer, (probs_TE, map_TE) in seen:
            for token in torch.nonzero(real_T).flatten().tolist():
                place = int(batch["half"][token % rows]), int(batch["dataset_id"][token % rows]), layer
                weight_E, chosen_E = probs_TE[token].detach().double().numpy(), map_TE[token].numpy()
                for kind, options in KINDS.items():
                    if trained_T[token] or not options.get("trained_only"):
                        answers[kind][place] += weight_E if options.get("by_probability") else chosen_E
    for hook in hooks:
        hook.remove()
    return answers


@pytest.fixture(scope="module")
def start(run_yaml, tmp_path_factory):
    """Flags that begin with the same weights in every layout."""
    folder = tmp_path_factory.mktemp("initial")
    run_ranks(1, programs.save_initial_weights, run_yaml, [*FLAGS, *ep(1)], folder)
    return [*FLAGS, "--pretrained-checkpoint", str(folder / "checkpoints")]


@pytest.fixture(scope="module")
def one_rank(run_yaml, start, tmp_path_factory):
    """What one rank measures, and the oracle."""
    return run_ranks(
        1, loads_of_every_kind, run_yaml, [*start, *ep(1)], tmp_path_factory.mktemp("one"), timeout=400
    )[0]


def assert_same(kind, loads, expected):
    if "probability" in kind:  # what the routers give differs in the last bits from layout to layout
        np.testing.assert_allclose(loads, expected, atol=1e-4)
    else:
        assert loads.dtype == np.int64
        np.testing.assert_array_equal(loads, expected)


def test_I6_one_rank_measures_what_its_routers_chose(one_rank):
    measured, expected = one_rank
    for kind, (step_HDLE, probe_HDLE) in measured.items():
        assert_same(kind, step_HDLE, expected[kind])
        assert (step_HDLE.sum(axis=(2, 3)) > 0).all() and (probe_HDLE.sum(axis=(2, 3)) > 0).all()
    tokens_D = measured["all"][0].sum(axis=(0, 2, 3)) / 2 / LAYERS
    trained_D = measured["trained"][0].sum(axis=(0, 2, 3)) / 2 / LAYERS
    assert (trained_D < tokens_D).all() and (trained_D > 0).all()


def test_probabilities_sum_to_the_routers_scale_times_the_tokens(one_rank):
    for counted, weighed in (("all", "probability"), ("trained", "trained probability")):
        for counts_HDLE, mass_HDLE in zip(one_rank[0][counted], one_rank[0][weighed], strict=True):
            tokens_HDL = counts_HDLE.sum(axis=3) / 2
            np.testing.assert_allclose(mass_HDLE.sum(axis=3), SCALE * tokens_HDL, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_I6_loads_of_every_kind_are_those_of_one_rank(name, one_rank, run_yaml, start, tmp_path):
    world_size, flags = LAYOUTS[name]
    for measured, _ in run_ranks(world_size, loads_of_every_kind, run_yaml, [*start, *flags], tmp_path):
        for kind, loads in measured.items():
            for mine, expected in zip(loads, one_rank[0][kind], strict=True):
                assert_same(kind, mine, expected)


def losses_of_a_dense_model(run_yaml, flags, run_dir):
    """Probe losses, and whether a second measurement and the parameters are what they were."""
    trainer = programs.build(run_yaml, flags, run_dir)
    config = load_config(run_yaml, flags)
    probe = Probe(
        trainer.loader.sources,
        trainer.run,
        probe_tokens=256,
        seq_length=config.data.seq_length,
        micro_batch_size=2,
        dp_rank=torch.distributed.get_rank(),
        dp_size=torch.distributed.get_world_size(),
    )
    before = [parameter.clone() for chunk in trainer.run.chunks for parameter in chunk.parameters()]
    counts_HDLE, stats = probe.measure({}, 0)
    again = probe.measure({}, 1)[1]
    after = [parameter for chunk in trainer.run.chunks for parameter in chunk.parameters()]
    same = all(map(torch.equal, before, after))
    return counts_HDLE.numel(), stats.source_losses(), again.source_losses(), same


def test_a_dense_model_has_probe_losses_and_no_loads(run_yaml, tmp_path):
    flags = [*SMALL, "--num-experts", "null", *ep(1), "--strategy", "uniform"]
    for size, losses, again, same in run_ranks(2, losses_of_a_dense_model, run_yaml, flags, tmp_path):
        assert size == 0 and losses == again and same
        assert len(losses) == SOURCES and all(5 < loss < 12 for loss in losses)


OPTIONS = {
    "probe": ["--probe-rows", "rotating", "--load-mass", "probability"],
    "train": ["--load-mass", "probability", "--load-tokens", "trained"],
}


@pytest.mark.parametrize("signal", quick_or_slow(OPTIONS, {"train"}))
def test_I2_I7_runs_with_other_loads_resume_exactly_and_measuring_changes_nothing(signal, run_yaml, tmp_path):
    """`prove` stops inside an interval; sums of probabilities and the rows' turn go on where they were."""
    flags = [*FLAGS, *ep(2), *OPTIONS[signal]]
    ranks = run_ranks(2, layouts.prove, run_yaml, flags, tmp_path, signal)
    for runs, _ in ranks:
        assert runs["resumed"]["parameters"] == runs["whole"]["parameters"]
        for measured in ("probe", "train"):
            assert runs["off"]["parameters"] == runs[measured]["parameters"]
    runs = ranks[0][0]
    for key in ("losses", "loads", "weights", "rows"):
        assert runs["first"][key] + runs["resumed"][key] == runs["whole"][key], key
    with pytest.raises(InputError, match=r"was \w+ when .* what gate loads are; resume with"):
        check_resume(
            load_config(run_yaml, [*FLAGS, *ep(2)]), [], tmp_path / "whole", "must", allow_source_change=True
        )
    assert len(runs["probe"]["loads"]) == 2 and runs["probe"]["loads"][0] != runs["probe"]["loads"][1]
