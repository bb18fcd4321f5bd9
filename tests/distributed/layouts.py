"""Layouts to compare with one rank, and what their ranks run. Axes: D sources, L MoE layers, E experts."""

import hashlib

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

from megatron_dynmix.config.load import load_config
from megatron_dynmix.records import writer
from megatron_dynmix.records.schema import plain
from tests.distributed import programs

TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
ETP1 = ["--expert-tensor-parallel-size", "1"]
PP2 = ["--pipeline-model-parallel-size", "2"]
VPP2 = [*PP2, "--virtual-pipeline-model-parallel-size", "2"]
INSTANCES = ["--num-distributed-optimizer-instances", "2"]
GATHER = ["--overlap-grad-reduce", "--overlap-param-gather"]
CP2 = ["--context-parallel-size", "2"]


def ep(size):
    return ["--expert-model-parallel-size", str(size)]


VARIANTS = {
    "base": [],
    "shared experts": ["--moe-shared-expert-intermediate-size", "24"],
    "expert bias": [
        *("--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"),
        *("--moe-z-loss-coeff", "0.1"),
    ],
    "strong balance": [
        *("--moe-router-load-balancing-type", "[aux_loss, seq_aux_loss]"),
        *("--moe-aux-loss-coeff", "[0.5, 0.5]", "--moe-z-loss-coeff", "0.1"),
    ],
    "padded segments": ["--segment-multiple", "8"],
    "capacity": ["--moe-expert-capacity-factor", "1.0"],
    "padded capacity": [
        *("--moe-expert-capacity-factor", "1.0", "--moe-pad-expert-input-to-capacity"),
        *("--moe-token-drop-policy", "position"),
    ],
}
"""Models that need a run on one rank of their own to be compared with."""


def full(method, layers):
    return [
        *("--recompute-granularity", "full", "--recompute-method", method),
        *("--recompute-num-layers", str(layers)),
    ]


LAYOUTS = {
    "EP2": (2, ep(2), "base"),
    "EP4": (4, ep(4), "base"),
    "DP4": (4, ep(1), "base"),
    "EP2 x DP2": (4, ep(2), "base"),
    "EP2, allgather": (2, [*ep(2), "--moe-token-dispatcher-type", "allgather"], "base"),
    "TP2 x EP2, ETP1": (2, [*TP2, *ETP1, *ep(2)], "base"),
    "TP2, ETP1": (2, [*TP2, *ETP1, *ep(1)], "base"),
    "TP2, ETP2": (2, [*TP2, *ep(1)], "base"),
    "TP2 x EP2, ETP2": (4, [*TP2, *ep(2)], "base"),
    "PP2 x EP2": (4, [*PP2, *ep(2)], "base"),
    "PP2 x TP2 x EP2": (4, [*PP2, *TP2, *ETP1, *ep(2)], "base"),
    "PP2 VPP2 x EP2": (4, [*VPP2, *ep(2)], "base"),
    "CP2": (2, [*CP2, *ep(1)], "base"),
    "CP2 x EP2": (2, [*CP2, *ep(2)], "base"),
    "CP2, ETP2": (2, [*CP2, "--expert-tensor-parallel-size", "2", *ep(1)], "base"),
    "CP2 x TP2": (4, [*CP2, *TP2, *ETP1, *ep(4)], "base"),
    "CP2 x PP2 VPP2": (4, [*CP2, *VPP2, *ep(2)], "base"),
    "EP2, full recompute": (2, [*ep(2), *full("uniform", 1)], "base"),
    "EP2, no distributed optimizer": (2, [*ep(2), "--no-use-distributed-optimizer"], "base"),
    "EP2 x DP2, overlapped gathering": (4, [*ep(2), *GATHER], "base"),
    "PP2 VPP2, overlapped reduction": (2, [*VPP2, *ep(1), "--overlap-grad-reduce"], "base"),
    "PP2 VPP2 x DP2, aligned gathering": (4, [*VPP2, *ep(1), *GATHER], "base"),
    "PP2 VPP2 x DP2, gathering in the step": (
        4,
        [*VPP2, *ep(1), *GATHER, "--overlap-param-gather-with-optimizer-step"],
        "base",
    ),
    "TP2 x EP2, shared experts": (2, [*TP2, *ETP1, *ep(2)], "shared experts"),
    "EP2, overlapped shared experts": (2, [*ep(2), "--moe-shared-expert-overlap"], "shared experts"),
    "CP2 x TP2, ETP1, strong balance": (4, [*CP2, *TP2, *ETP1, *ep(1)], "strong balance"),
    "PP2 x TP2 x EP2, expert bias": (4, [*PP2, *TP2, *ETP1, *ep(2)], "expert bias"),
    "CP2, expert bias, full recompute": (2, [*CP2, *ep(2), *full("uniform", 2)], "expert bias"),
    "PP2, expert bias, full recompute of one layer": (
        2,
        [*PP2, *ep(1), *full("block", 1)],
        "expert bias",
    ),
    "EP2, expert bias, selective recompute": (
        2,
        [*ep(2), "--recompute-granularity", "selective", "--recompute-modules", "[moe]"],
        "expert bias",
    ),
    "CP2, padded segments": (2, [*CP2, *ep(2)], "padded segments"),
    "EP2, capacity": (2, ep(2), "capacity"),
    "TP2 x EP2, padded capacity": (2, [*TP2, *ETP1, *ep(2)], "padded capacity"),
}
"""Name -> ranks, flags, variant of the model."""

ITERATIONS, STOP, INTERVAL = 4, 3, 2
SHORT = 2
"""Iterations of the runs that measure after each of them and change nothing."""


class Recorder:
    """Stands in for `MetricsWriter`: keeps a run's records in memory, and writes and draws nothing."""

    def __init__(self, *args, **kwargs):
        self.metrics, self.updates = [], []

    def training(self, record):
        self.metrics.append(plain(vars(record)))

    def mixing(self, record):
        self.updates.append(plain(vars(record)))

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def start_anew():
    """Forget what Megatron-Core keeps between two models of one process; the process groups stay.

    The other such states are set again by every run: the number of micro-batches by `join_job`, the
    random generators before each iteration, the scale of the auxiliary loss in each step.
    """
    if parallel_state.model_parallel_is_initialized():
        clear_aux_losses_tracker()


def prove(run_yaml, flags, run_dir, signal):
    """Everything that the invariants speak of, seen by this rank, in one job."""
    short = [*flags, "--train-iters", str(SHORT), "--interval", "1"]
    still = [*short, "--eta", "0"]
    answers = {
        **whole_and_resumed(run_yaml, flags, run_dir, signal),
        "off": _train(run_yaml, [*short, "--strategy", "uniform"], run_dir / "off"),
        "probe": _train(run_yaml, [*still, "--signal", "probe"], run_dir / "probe"),
        "train": _train(run_yaml, [*still, "--signal", "train"], run_dir / "train"),
    }
    start_anew()
    return answers, programs.count_one_step(run_yaml, flags, run_dir / "counts")


def whole_and_resumed(run_yaml, flags, run_dir, signal):
    """A run, and the same run in two parts, seen by this rank."""
    flags = [*flags, "--interval", str(INTERVAL), "--signal", signal, "--lr-decay-iters", str(ITERATIONS)]
    whole, first = ([*flags, "--train-iters", str(iterations)] for iterations in (ITERATIONS, STOP))
    return {
        "whole": _train(run_yaml, whole, run_dir / "whole"),
        "first": _train(run_yaml, first, run_dir / "parts"),
        "resumed": _train(run_yaml, whole, run_dir / "parts", resume="must"),
    }


def _train(run_yaml, flags, run_dir, resume="no"):
    writer.MetricsWriter = Recorder
    start_anew()
    trainer = programs.train_from(load_config(run_yaml, flags), run_dir, resume=resume)
    torch.distributed.barrier()
    return _seen(trainer)


def assert_same_gradients(ranks, one):
    """What every rank has of every tensor is what one rank has there: gradients to rounding, biases exactly.

    Of a tensor padded for the layout, what one rank has too.
    """
    whole = {}
    for name, offset, values in one:
        whole.setdefault(name, []).append((np.array(offset), values))
    for found in ranks:
        for name, offset, values in found:
            largest = max(np.abs(part).max() for _, part in whole[name])
            seen = 0
            for start, part in whole[name]:
                first = np.maximum(start, offset)
                last = np.minimum(start + part.shape, np.array(offset) + values.shape)
                if (first >= last).any():
                    continue
                mine = values[tuple(map(slice, first - offset, last - offset))]
                its = part[tuple(map(slice, first - start, last - start))]
                exact = name.endswith("expert_bias")
                np.testing.assert_allclose(
                    mine, its, rtol=0, atol=0 if exact else 1e-5 * largest, err_msg=f"{name} {offset}"
                )
                seen += mine.size
            assert seen == values.size or "embed" in name or "output_layer" in name, f"{name} {offset}"


def _seen(trainer):
    """Bits of a run: losses, order and weights on rank 0; the blend and a hash of each tensor on all."""
    metrics, updates = (trainer.writer.metrics, trainer.writer.updates) if trainer.writer else ([], [])
    return {
        "losses": [(record["lm_loss"], record["grad_norm"]) for record in metrics],
        "source_losses": [record["source_loss"] for record in metrics],
        "aux_losses": [record["aux_losses"] for record in metrics],
        "tokens": [record["tokens"] for record in metrics],
        "rows": [record["rows"] for record in updates],
        "weights": [record["new_weights"] for record in updates],
        "loads": [record["load"] for record in updates],
        "blend": trainer.mixed.plan.state.to_json(),
        "parameters": [
            hashlib.sha256(tensor.detach().view(torch.uint8).numpy()).hexdigest()
            for chunk in trainer.run.chunks
            for _, tensor in (*chunk.named_parameters(), *chunk.named_buffers())
        ],
    }
