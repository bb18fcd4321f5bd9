"""`plan --trace`: one iteration of the first, a middle and the last pipeline stage, on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_dynmix.config.host import Host
from megatron_dynmix.errors import InputError
from megatron_dynmix.plan.plan import Plan
from megatron_dynmix.plan.text import size_text
from megatron_dynmix.training.trace import Trace, trace

SHOWN = 8
"""Lines of a list."""
AT_ONCE = 2
"""Ranks that are traced side by side: each takes a core and some GiB of memory."""
WHEN = {"iteration": "in an iteration", "probe": "in a probe", "log": "where a log interval ends"}


def traced_stages(layout_pp: int) -> list[int]:
    """Return the stages that are traced: the others are like the middle one."""
    return sorted({0, layout_pp // 2, layout_pp - 1})


def trace_stages(plan: Plan, run_yaml: Path, flags: Sequence[str], host: Host) -> dict[int, Trace]:
    """Return what ranks of the traced stages show, by stage; `InputError` if this machine cannot tell."""
    if not host.cuda:
        raise InputError(
            "--trace tells what GPUs would hold, but the ranks are planned on CPUs (float32 without --host); "
            "leave it out, or give --bf16 or --host cuda"
        )
    ranks = plan.layout.groups()["PP"][0]
    stages = traced_stages(plan.layout.pp)

    def of(stage: int) -> Trace:
        return trace(
            *(run_yaml, list(flags)),
            rank=ranks[stage],
            world_size=plan.world_size,
            transformer_engine=host.transformer_engine,
        )

    with ThreadPoolExecutor(AT_ONCE) as workers:
        return dict(zip(stages, workers.map(of, stages), strict=True))


def trace_text(plan: Plan, traces: Mapping[int, Trace]) -> str:
    """Return memory by place and waits for the device, stage by stage."""
    return "\n\n".join(_stage_text(plan, stage, traced) for stage, traced in traces.items())


def _stage_text(plan: Plan, stage: int, traced: Trace) -> str:
    planned = plan.memory[stage].total
    lines = [
        f"trace    stage {stage}, rank {traced.rank}: at most {size_text(traced.peak)} in an iteration, "
        f"{traced.peak / planned - 1:+.1%} to the {size_text(planned)} planned; at the peak",
        *_listed({place: size_text(size) for place, size in traced.places.items()}),
    ]
    for phase, waits in traced.waits.items():
        lines += [f"  waits for the device {WHEN[phase]}: {sum(waits.values())}"]
        lines += _listed({place: str(times) for place, times in waits.items()})
    return "\n".join(lines)


def _listed(values: Mapping[str, str]) -> list[str]:
    lines = [f"    {value:>9}  {place}" for place, value in list(values.items())[:SHOWN]]
    more = len(values) - SHOWN
    return [*lines, f"    and {more} smaller"] if more > 0 else lines
