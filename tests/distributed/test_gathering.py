"""`overlap_param_gather`: parameters that are gathered as late as can be are read by nobody before.

Each run is compared, bit for bit, with the same one without it.
"""

import json

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_dynmix.config.load import load_config
from megatron_dynmix.records import writer
from megatron_dynmix.training.trainer import Trainer
from tests.distributed import layouts, programs
from tests.distributed.conftest import SMALL, quick_or_slow
from tests.distributed.layouts import GATHER, PP2, VPP2, ep
from tests.distributed.ranks import run_ranks

BF16 = ["--bf16"]
SHARED = ["--moe-shared-expert-intermediate-size", "24"]
CASES = {
    "DP2": (2, [*ep(1), "--async-save"]),
    "DP2, many buckets that end in padding": (2, [*ep(1), "--bucket-size", "3000"]),
    "DP2, bf16, frozen router": (2, [*ep(1), *BF16, "--freeze-router"]),
    "DP2, router of two layers": (2, [*ep(1), "--router-network", "mlp", "--router-noise", "training"]),
    "DP2, tied embeddings": (2, [*ep(1), "--no-untie-embeddings-and-output-weights"]),
    "DP2, full-width norms": (2, [*ep(1), "--qk-layernorm", "--qk-layernorm-full-width"]),
    "EP2, shared experts": (4, [*ep(2), *SHARED, "--moe-shared-expert-overlap"]),
    "EP2, gated shared experts": (4, [*ep(2), *SHARED, "--moe-shared-expert-gate"]),
    "EP2, overlapped gated shared experts": (
        4,
        [*ep(2), *SHARED, "--moe-shared-expert-gate", "--moe-shared-expert-overlap"],
    ),
    "DP2, full recompute": (2, [*ep(1), *layouts.full("uniform", 1)]),
    "PP2 x DP2": (4, [*PP2, *ep(2)]),
    "PP2 VPP2 x DP2": (4, [*VPP2, *ep(1)]),
}


def gather_late():
    """Gather a bucket only where a module waits for it; until then, what others have stepped is NaN."""
    plain, train_step = _ParamAndGradBucketGroup.start_param_sync, Trainer.train_step

    class Late:
        def __init__(self, group):
            self.group = group

        def wait(self):
            self.group.param_gather_handle = None
            plain(self.group, force_sync=True)

    def start(group, force_sync=False):
        if force_sync:
            plain(group, force_sync=True)
        else:
            group.param_gather_handle, group.param_gather_dispatched = Late(group), True

    def stepped(trainer, *args):
        stopping = train_step(trainer, *args)
        for chunk in trainer.run.chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                for bucket in group.buckets:
                    parts = bucket.param_data.chunk(group.intra_distributed_optimizer_instance_size)
                    for rank, part in enumerate(parts):
                        if rank != group.intra_distributed_optimizer_instance_rank:
                            part.fill_(torch.nan)
        return stopping

    _ParamAndGradBucketGroup.start_param_sync, Trainer.train_step = start, stepped


def on_and_off(run_yaml, flags, run_dir):
    """What a run without overlapped gathering sees, and what one with it that is stopped and resumed."""
    writer.MetricsWriter = layouts.Recorder

    def seen(name, *more, resume="no"):
        layouts.start_anew()
        trainer = programs.train_from(load_config(run_yaml, [*flags, *more]), run_dir / name, resume=resume)
        return layouts._seen(trainer)

    off = seen("off", "--overlap-grad-reduce")
    gather_late()
    first = seen("on", *GATHER, "--train-iters", "3", "--lr-decay-iters", "4")
    resumed = seen("on", *GATHER, resume="must")
    return off, first, resumed, [_shards(run_dir / name) for name in ("off", "on")]


def _shards(run_dir):
    """The checksums of the shards, model and optimizer, of a checkpoint that no probe came before."""
    sums = json.loads((run_dir / "checkpoints/iter_0000003/checksums.json").read_text())
    return {name: own for name, own in sums.items() if name.endswith(".distcp")}


@pytest.mark.parametrize("case", quick_or_slow(CASES, {"DP2"}))
def test_late_parameters_change_no_bit(case, run_yaml, tmp_path):
    """Losses, probed loads, weights and parameters, over a checkpoint written beside the training."""
    world_size, flags = CASES[case]
    flags = [*SMALL, "--num-layers", "4", "--signal", "probe", "--probe-tokens", "256", *flags]
    flags += ["--save-interval", "3"]
    answers = run_ranks(world_size, on_and_off, run_yaml, flags, tmp_path)
    for off, first, resumed, (shards_off, shards_on) in answers:
        assert shards_on == shards_off != {}
        assert resumed["parameters"] == off["parameters"] != first["parameters"]
        for key in ("losses", "source_losses", "weights", "loads"):
            assert first[key] + resumed[key] == off[key], key
