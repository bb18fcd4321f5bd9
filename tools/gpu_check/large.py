"""What a device takes for a model that fills it. Axes: P pairs of iterations, R repetitions.

The model, its data and all that is measured share one process, so that ratios are of one clock and one state
of the device.
"""

from __future__ import annotations

import functools
import time
from functools import partial

import numpy as np
import torch
from torch.profiler import profile

from benchmarks import counting as counting_benchmark
from benchmarks import overhead
from megatron_dynmix.job.signals import StopRequest
from megatron_dynmix.plan.parameters import (
    model_parameters,
    this_host,
    transformer_here,
)
from megatron_dynmix.plan.plan import Plan
from megatron_dynmix.training.trainer import Trainer
from tools.gpu_check import figures as figured
from tools.gpu_check.small import HERE, activities, attention_of, build, traced_here
from tools.gpu_check.supervise import Figures, Job

FULL = (
    *(
        "--num-layers",
        "8",
        "--hidden-size",
        "2048",
        "--ffn-hidden-size",
        "1024",
        "--num-attention-heads",
        "16",
    ),
    *(
        "--num-query-groups",
        "4",
        "--num-moe-experts",
        "64",
        "--moe-router-topk",
        "6",
        "--vocab-size",
        "32000",
    ),
    *("--max-position-embeddings", "4096", "--seq-length", "4096", "--probe-tokens", "16384"),
)
TINY = ("--num-layers", "2", "--seq-length", "128", "--probe-tokens", "256")
SETTINGS = ("--bf16", "--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "1000")
TOLERANCE = 0.05
PAIRS, WARM_UP = 30, 4
"""Pairs of iterations; there are fewer at a tiny size."""


@functools.cache
def trainer_of(job: Job) -> Trainer:
    """Build the run, once in a process, and train two iterations: the first ones compile."""
    trainer = build(job, f"large-{time.time_ns()}", flags_of(job))
    for _ in range(2):
        trainer.train_step(StopRequest())
    return trainer


def flags_of(job: Job) -> list[str]:
    """Return the flags of the run."""
    return [*SETTINGS, *(TINY if job.tiny else FULL)]


def pairs_of(job: Job) -> tuple[int, int]:
    """Return the pairs that are timed, and those before them."""
    return (3, 1) if job.tiny else (PAIRS, WARM_UP)


def beside_bare_loop(job: Job, figures: Figures) -> None:
    """Time our iteration and one of a bare Megatron-Core loop in swapped pairs; relate them to the device."""
    trainer = trainer_of(job)
    positions = trainer.config.training.global_batch_size * trainer.config.data.seq_length
    ours_P, bare_P = overhead.measure_steps(trainer, *pairs_of(job))
    figures.update(figured.ratio_of_pairs(ours_P, bare_P), pairs=len(ours_P), positions=positions)
    flops, peak = flops_of(trainer), matrix_product_flops(512 if job.tiny else 8192)
    figures.update(parameters=model_parameters(trainer.config), flops_per_position=flops, peak_flops=peak)
    for name, seconds_P in (("ours", ours_P), ("bare", bare_P)):
        rate = figured.tokens_per_second(positions, seconds_P)
        figures[name] = {
            "seconds": float(np.median(seconds_P)),
            "tokens_per_second": rate,
            "mfu": figured.utilization(flops, rate, peak),
        }


def flops_of(trainer: Trainer) -> float:
    """Return the operations that training the run's model takes for a position."""
    config, transformer = trainer.config, transformer_here(trainer.config)
    return figured.training_flops(
        model_parameters(config, active=True),
        config.model.vocab_size * transformer.hidden_size,
        transformer.num_layers,
        transformer.num_attention_heads * transformer.kv_channels,
        config.data.seq_length,
    )


def matrix_product_flops(size: int, repetitions: int = 10) -> float:
    """Return the operations a second of a product of two square bf16 matrices."""
    one, other = (torch.randn(size, size, device=HERE.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one @ other
    HERE.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        one @ other
    HERE.synchronize()
    return repetitions * 2 * size**3 / (time.perf_counter() - start)


def counting(job: Job, figures: Figures) -> None:
    """Time passes that count gate loads and passes that do not, in swapped pairs."""
    pairs, warm_up = pairs_of(job)
    timings = counting_benchmark.measure(trainer_of(job), max(pairs // 2, 2), warm_up)
    wall = 0
    on_P, off_P = timings.on_P2[:, wall], timings.off_P2[:, wall]
    figures.update(figured.ratio_of_pairs(on_P, off_P), pairs=len(on_P))
    figures.update(milliseconds_on=float(np.median(on_P)), milliseconds_off=float(np.median(off_P)))


def probe(job: Job, figures: Figures) -> None:
    """Time weight updates with their probe, as a share of an interval of iterations."""
    trainer = trainer_of(job)
    while not trainer.mixed.reweighting.is_due(trainer.progress.iteration):
        trainer.train_step(StopRequest())
    update_R = overhead.measure_probe(trainer, 3)
    step_R = [overhead.seconds(partial(trainer.train_step, StopRequest())) for _ in range(3)]
    update, step = float(np.median(update_R)), float(np.median(step_R))
    interval = overhead.INTERVAL
    figures.update(
        update_seconds=update,
        positions=trainer.config.mixing.probe_tokens * len(trainer.config.data.sources),
        interval=interval,
        share=update / (update + interval * step),
    )


def peak_memory(job: Job, figures: Figures) -> None:
    """Hold the most memory that was in use during an iteration against that of `plan` and of the trace."""
    trainer = trainer_of(job)
    planned = Plan(config=trainer.config, world_size=1, host=this_host(), sources={}).largest
    figures.update(planned=planned.total, planned_with_reserve=planned.needed)
    if HERE.device.type != "cuda":
        figures["skipped"] = "only a GPU's allocator knows its peak"
        return
    torch.cuda.reset_peak_memory_stats()
    trainer.train_step(StopRequest())
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    figures.update(peak=peak, held=held, peak_of_planned=peak / planned.total)
    said = {"plan": planned.total}
    if traced := traced_here(job, figures, flags_of(job)):
        figures.update(traced=traced.peak, peak_of_traced=peak / traced.peak)
        said["the trace"] = traced.peak
    for who, expected in said.items():
        assert abs(peak / expected - 1) <= TOLERANCE, f"{who} is off by more than {TOLERANCE:.0%}"
    assert held <= planned.needed, "the allocator holds more than plan says a GPU should have"


def idle(job: Job, figures: Figures) -> None:
    """Measure the part of an iteration in which no kernel runs, and name the kernels of attention."""
    trainer = trainer_of(job)
    HERE.synchronize()
    with profile(activities=activities()) as profiled:
        for _ in range(2):
            trainer.train_step(StopRequest())
        HERE.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type.name.lower() == HERE.device.type and not event.is_user_annotation
    ]
    begin, end = min(start for start, _ in spans), max(end for _, end in spans)
    figures.update(attention_of(profiled), events=len(spans), profiled_seconds=(end - begin) / 1e6)
    figures["idle_share"] = figured.idle_share(spans, begin, end)
