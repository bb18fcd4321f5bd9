"""An iteration of every example on GPUs that are not there: memory as planned, and a budget of waits.

`BUDGET` is the table of docs/overhead.md. Shapes, types and devices are checked by running at all.
"""

import os
import re
from pathlib import Path

import pytest

from megatron_dynmix.commands.tracing import traced_stages
from megatron_dynmix.config.host import Host
from megatron_dynmix.config.load import load_config
from megatron_dynmix.config.megatron import moe_layers
from megatron_dynmix.plan.layout import Layout
from megatron_dynmix.plan.memory import memory_by_stage
from megatron_dynmix.plan.parameters import stage_layers, transformer_here
from megatron_dynmix.platform.fake.process import what_is_missing
from megatron_dynmix.training.trace import PROBED_ROWS, trace

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    name: "/on/another/machine" for name in ("MIXTRAL", "QWEN3", "LLAMA_MOE", "MOLM", "DATA", "WORK")
}
TE, CUDA = Host(cuda=True, transformer_engine=True), Host(cuda=True, transformer_engine=False)

EXAMPLES = {
    "mixtral_8x7b": (64, TE, []),
    "mixtral_8x22b": (128, TE, ["--global-batch-size", "64"]),
    "qwen3_30b_a3b": (32, TE, ["--global-batch-size", "64"]),
    "llama_moe_paper": (4, TE, ["--preset", "llama-moe-3.5b-2-8", "--global-batch-size", "32"]),
    "molm_paper": (4, TE, ["--preset", "molm-700m-4b", "--num-layers", "6", "--global-batch-size", "32"]),
    "four_sources": (2, CUDA, []),
    "study": (1, CUDA, []),
}
"""Example -> ranks, what they have, and flags: no more micro-batches than are ever in flight, but two."""
QUICK = [("mixtral_8x7b", 3, ["--global-batch-size", "64"]), ("four_sources", 0, [])]
"""What is traced by default: with half the micro-batches as many are in flight."""
BUDGET = {
    "iteration": {
        "megatron_dynmix/training/step.py (train)": 1,
        "megatron/core/optimizer/clip_grads.py (get_grad_norm_fp32)": 1,
        "transformer_engine/pytorch/utils.py (_empty_tensor)": 1,  # in the first iteration of a process
    },
    "probe": {
        "megatron_dynmix/training/step.py (__call__)": 1,
        "megatron_dynmix/platform/__init__.py (synchronize)": 1,
        "megatron_dynmix/training/probe.py (measure)": 1,
    },
    "log": {"megatron_dynmix/training/step.py (<dictcomp>)": 2},  # one for each auxiliary loss
}
"""Most waits for the device by place, whatever the number of layers and micro-batches."""
DISPATCHER = "megatron/core/transformer/moe/token_dispatcher.py (_maybe_dtoh_and_synchronize)"
ROUTED = "megatron_dynmix/model/expert_attention.py (__init__)"
BLOCKS = "megatron_dynmix/model/stick_breaking.py (_blocks)"
PERMUTE = "megatron/core/transformer/moe/moe_utils.py (permute)"


def per_layer(config, passes):
    """What each pass of an MoE layer costs: rows of experts are counted on the device.

    Only unfused permutation, which selects by a mask, waits for more than their numbers.
    """
    model = config.model.megatron
    again = model.get("recompute_granularity") == "full" or "moe" in (model.get("recompute_modules") or [])
    passes *= 2 if again else 1
    attention = passes if config.model.attention_experts else 0
    return {
        DISPATCHER: passes,
        PERMUTE: 0 if model.get("moe_permute_fusion") else 2 * passes,
        ROUTED: attention,
        BLOCKS: attention,
    }


def stages_of_examples():
    """Every traced stage of every example."""
    for name, (world_size, _, flags) in EXAMPLES.items():
        with pytest.MonkeyPatch.context() as patched:
            for variable, folder in ELSEWHERE.items():
                patched.setitem(os.environ, variable, folder)
            config = load_config(ROOT / "examples" / name / "RUN.yaml", flags)
        for stage in traced_stages(Layout.of(config, world_size).pp):
            yield pytest.param(name, stage, flags, id=f"{name} {stage}", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "stage", "flags"), [*QUICK, *stages_of_examples()])
def test_an_iteration_waits_within_its_budget_and_takes_the_memory_planned(name, stage, flags, monkeypatch):
    world_size, host, _ = EXAMPLES[name]
    if missing := what_is_missing(transformer_engine=host.transformer_engine):
        pytest.skip(missing)
    for variable, folder in ELSEWHERE.items():
        monkeypatch.setenv(variable, folder)
    run_yaml = ROOT / "examples" / name / "RUN.yaml"
    config = load_config(run_yaml, flags)
    layout = Layout.of(config, world_size)
    traced = trace(
        *(run_yaml, flags),
        rank=layout.groups()["PP"][0][stage],
        world_size=world_size,
        transformer_engine=host.transformer_engine,
    )
    allowed = {phase: dict(places) for phase, places in BUDGET.items()}
    transformer = transformer_here(config)
    here = [layer for chunk in stage_layers(transformer, stage) for layer in chunk]
    routed = len(set(here) & set(moe_layers(transformer)))
    allowed["iteration"] |= per_layer(config, routed * layout.micro_batches(config))
    allowed["probe"] |= per_layer(config, routed * PROBED_ROWS * len(config.data.sources))
    for phase, places in traced.waits.items():
        seen = {}
        for line, times in places.items():
            place = re.sub(r":\d+ ", " ", line)
            seen[place] = seen.get(place, 0) + times
        over = {place: times for place, times in seen.items() if times > allowed[phase].get(place, 0)}
        assert not over, f"{phase}: waits for the device over its budget"
    planned = memory_by_stage(config, layout, host)[stage].total
    assert abs(traced.peak / planned - 1) <= 0.05, (traced.peak / 2**30, planned / 2**30)
