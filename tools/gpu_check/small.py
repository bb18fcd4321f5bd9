"""What a device has to do right, on the quickstart's tiny model.

Axes: H halves, D sources, L layers, E experts.

A run on a CPU, on record in `cpu.json`, says what is right. Both start from the same numbers: they follow
from the names of the tensors, not from a device's generator.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dynmix import platform
from megatron_dynmix.commands.quickstart import make_quickstart
from tools.gpu_check.figures import largest_difference
from tools.gpu_check.supervise import Figures, Job

HERE = platform.start()  # before anything that imports megatron.core

from torch.profiler import ProfilerActivity, profile  # noqa: E402

from megatron_dynmix.checkpoint.tensors import own_slices  # noqa: E402
from megatron_dynmix.config.load import load_config  # noqa: E402
from megatron_dynmix.errors import InputError  # noqa: E402
from megatron_dynmix.job.signals import StopRequest  # noqa: E402
from megatron_dynmix.model.gpt import unwrap  # noqa: E402
from megatron_dynmix.moe.counter import reduce_counts  # noqa: E402
from megatron_dynmix.records.jsonl import read_records  # noqa: E402
from megatron_dynmix.training import run  # noqa: E402
from megatron_dynmix.training.setup import check_before_start, prepare_run, set_up  # noqa: E402
from megatron_dynmix.training.trace import Trace, trace  # noqa: E402
from megatron_dynmix.training.trainer import Trainer  # noqa: E402
from tools.gpu_check.synchronizations import beyond, synchronizations  # noqa: E402

RECORD = Path(__file__).with_name("cpu.json")
SETTINGS = [
    *("--expert-model-parallel-size", "1", "--num-workers", "0", "--probe-tokens", "4096", "--lr", "1e-3"),
    *("--lr-warmup-iters", "0", "--log-interval", "1", "--strategy", "gate-load", "--signal", "probe"),
]
WEIGHTS_ABOUT = 0.05
BF16 = ["--bf16"]
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
"""Of the losses of an iteration, relative: a GPU sums in another order, so a router may choose otherwise."""
ATTENTION = "aten::_scaled_dot_product"


def data_of(job: Job) -> Path:
    """Return the RUN.yaml of the quickstart's sources, in a folder that may be written to."""
    folder = job.scratch / "data"
    if not folder.exists() and job.data.exists():
        shutil.copytree(job.data, folder)
    return make_quickstart(folder)


def build(job: Job, name: str, flags: list[str]) -> Trainer:
    """Build the trainer of a run that has not begun, as `train` does."""
    config = load_config(data_of(job), [*SETTINGS, *flags])
    run.join_job(config)
    trainer = run.build_trainer(prepare_run(check_before_start(config)), job.scratch / name)
    trainer.say = trainer.saving.say = lambda text: None
    return trainer


class NamedNumbers:
    """Tensors whose numbers follow from their names: the same on every device and in every layout."""

    def __init__(self, trainer: Trainer) -> None:
        own = list(own_slices(map(unwrap, trainer.run.chunks)))
        self.shapes = {item.key: item.global_shape for item in own}
        self.dtypes = {item.key: item.dtype for item in own}

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Return a box of a tensor: small numbers, ones where a norm multiplies."""
        box = tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))
        if "norm" in name:
            return torch.ones(shape)
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        whole = generator.random(self.shapes[name]) - 0.5
        return torch.from_numpy(2 * WEIGHTS_ABOUT * whole[box]).float()


def first_weights(job: Job) -> list[str]:
    """Write a checkpoint of those numbers, once; return the flags that start from it."""
    folder = job.scratch / "first/checkpoints"
    if not folder.exists():
        trainer = build(job, "first", [])
        trainer.checkpointer.load_tensors(NamedNumbers(trainer))
        trainer.save(last=True)
        trainer.writer.close()
    return ["--pretrained-checkpoint", str(folder)]


def train(job: Job, name: str, flags: list[str], **options: Any) -> dict[str, list[Any]]:
    """Train a whole run; return its losses, and what must be the same on every device."""
    folder = job.scratch / name
    run.train(set_up(load_config(data_of(job), [*SETTINGS, *flags]), folder, **options), folder, **options)
    metrics = read_records(folder / "metrics.jsonl")
    ledger = read_records(folder / "ledger.jsonl")
    return {
        "losses": [record["lm_loss"] for record in metrics],
        "tokens": [record["tokens"] for record in metrics],
        "digests": [line["digest"] for line in ledger if line["kind"] == "samples"],
    }


def eight_iterations(job: Job, precision: str) -> dict[str, list[Any]]:
    """Train a run that updates its weights: with bf16 at its end, for what bf16 measures decides on rows."""
    flags = ["--interval", "8", *BF16] if precision == "bf16" else ["--interval", "4"]
    return train(job, precision, ["--train-iters", "8", *flags, *first_weights(job)])


def first_counts(job: Job) -> tuple[np.ndarray, np.ndarray, int]:
    """Return counts [H, D, L, E] of the first step, its tokens [D], and the choices of a token."""
    trainer = build(job, "counts", first_weights(job))
    micro_batches = trainer.loader.step(0, 4)
    with trainer.run.counter.recording():
        stats = trainer.run(micro_batches, forward_only=False)
    counts_HDLE = reduce_counts(trainer.run.counter.take()).cpu().numpy()
    topk = trainer.run.chunks[0].config.moe_router_topk
    trainer.writer.close()
    return counts_HDLE, stats.tokens_D.numpy(), topk


def losses_fp32(job: Job, figures: Figures) -> None:
    """Train in fp32 what was trained on a CPU."""
    _compare_losses(job, figures, "fp32")


def losses_bf16(job: Job, figures: Figures) -> None:
    """Train in bf16 what was trained on a CPU."""
    _compare_losses(job, figures, "bf16")


def _compare_losses(job: Job, figures: Figures, precision: str) -> None:
    recorded, seen = json.loads(RECORD.read_text())[precision], eight_iterations(job, precision)
    apart = largest_difference(seen["losses"], recorded["losses"])
    figures.update(losses=seen["losses"], largest_difference=apart, tolerance=TOLERANCE[precision])
    for name in ("tokens", "digests"):
        assert seen[name] == recorded[name], f"other {name} than on a CPU: {seen[name]}, {recorded[name]}"
    assert apart <= TOLERANCE[precision], f"losses {apart:.2g} from those of a CPU"


def counts(job: Job, figures: Figures) -> None:
    """Count the choices of experts in one step: integers, equal to a CPU's."""
    counts_HDLE, tokens_D, topk = first_counts(job)
    figures.update(choices=int(counts_HDLE.sum()), tokens=int(tokens_D.sum()))
    assert (topk * tokens_D == counts_HDLE.sum(axis=(0, 3)).T).all(), "not topk choices for every token"
    recorded_HDLE = np.array(json.loads(RECORD.read_text())["counts_HDLE"])
    figures["differing"] = int(np.abs(counts_HDLE - recorded_HDLE).sum()) // 2
    assert figures["differing"] == 0, f"{figures['differing']} choices are others than on a CPU"


def resume(job: Job, figures: Figures) -> None:
    """Stop after four of six iterations and go on, from checkpoints written in either way."""
    flags = ["--interval", "3", "--train-iters", "6", *first_weights(job)]
    whole = train(job, "whole", flags)
    for name, saving in (("save", []), ("async_save", ["--async-save", "--save-interval", "2"])):
        train(job, name, [*flags, *saving, "--train-iters", "4", "--lr-decay-iters", "6"])
        parts = train(job, name, [*flags, *saving], resume="must")
        figures[f"{name}_largest_difference"] = largest_difference(parts["losses"], whole["losses"])
        assert parts["tokens"] == whole["tokens"], f"{name}: other tokens than without a stop"
        exact = 0.0 if HERE.device.type == "cpu" else TOLERANCE["fp32"]
        assert figures[f"{name}_largest_difference"] <= exact, f"{name}: other losses than without a stop"


def seeds(job: Job, figures: Figures) -> None:
    """Draw first weights: the same for a seed, others for another seed, in every tensor that is drawn."""
    one, again, other = (_drawn(job, f"seed-{n}", seed) for n, seed in enumerate((1, 1, 2)))
    figures["tensors"] = len(one)
    changed = [name for name in one if not torch.equal(one[name], again[name])]
    assert not changed, f"one seed gave two first values of {changed}"
    same = [name for name in one if torch.equal(one[name], other[name])]
    assert not same, f"do not depend on the seed: {same}"


def _drawn(job: Job, name: str, seed: int) -> dict[str, torch.Tensor]:
    trainer = build(job, name, ["--seed", str(seed)])
    trainer.writer.close()
    parameters = (item for chunk in trainer.run.chunks for item in chunk.named_parameters())
    return {name: tensor.detach().cpu() for name, tensor in parameters if tensor.unique().numel() > 1}


def waits(job: Job, figures: Figures) -> None:
    """Hold the lines at which an iteration makes the host wait against those of the trace."""
    trainer = build(job, "waits", first_weights(job))
    trainer.train_step(StopRequest())
    with synchronizations(HERE.device) as seen:
        trainer.train_step(StopRequest())
    trainer.writer.close()
    figures["lines"] = dict(seen.most_common())
    if not (traced := traced_here(job, figures, [])):
        return
    figures["traced"] = expected = traced.waits["iteration"]
    if HERE.device.type != "cuda":  # which torch's CUDA build may trace without one
        figures["not_compared"] = "a CPU has no waits for a device: the lines are those that read a value"
        return
    assert not (more := beyond(seen, expected)), f"waits that the trace does not have: {more}"


def traced_here(job: Job, figures: Figures, flags: list[str]) -> Trace | None:
    """Trace on fake tensors the run that ran here; None, with the reason on record, if that cannot be."""
    here = {"rank": 0, "world_size": 1, "transformer_engine": HERE.transformer_engine}
    try:
        return trace(data_of(job), [*SETTINGS, *flags], **here)
    except InputError as error:
        figures["not_compared"] = str(error)
        return None


def attention_fp32(job: Job, figures: Figures) -> None:
    """Name the kernels of attention in fp32."""
    _attention(job, figures, "attention-fp32", [])


def attention_bf16(job: Job, figures: Figures) -> None:
    """Name the kernels of attention in bf16."""
    _attention(job, figures, "attention-bf16", BF16)


def _attention(job: Job, figures: Figures, name: str, flags: list[str]) -> None:
    trainer = build(job, name, flags)
    trainer.train_step(StopRequest())
    with profile(activities=activities()) as profiled:
        trainer.train_step(StopRequest())
    trainer.writer.close()
    figures.update(attention_of(profiled))


def activities() -> list[ProfilerActivity]:
    """Return what a profiler is to look at here."""
    on_device = [ProfilerActivity.CUDA] if HERE.device.type == "cuda" else []
    return [ProfilerActivity.CPU, *on_device]


def attention_of(profiled: profile) -> dict[str, Any]:
    """Return the ways to compute attention that were taken, and the kernels they ran."""
    events = profiled.events()
    ways = [event for event in events if event.name.startswith((ATTENTION, "FlashAttn", "FusedAttn"))]
    launched = {kernel.name for way in ways for kernel in _kernels(way)}
    names = [way.name for way in ways]
    assert names, "no attention that the profiler knows by name"
    return {"ways": {name: names.count(name) for name in sorted(set(names))}, "kernels": sorted(launched)}


def _kernels(event: Any) -> list[Any]:
    """Return the kernels that an event and what it calls have launched."""
    return [*event.kernels, *(kernel for child in event.cpu_children for kernel in _kernels(child))]
