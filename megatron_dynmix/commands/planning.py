"""A run planned for ranks that are not there: checked as `train` would, and printed."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

from megatron_dynmix.commands.tracing import trace_stages, trace_text
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.check import check_settings
from megatron_dynmix.config.check.data import check_files, check_tokenizer
from megatron_dynmix.config.host import Host, check_host, without_unmet
from megatron_dynmix.config.idle import check_idle
from megatron_dynmix.config.load import load_config
from megatron_dynmix.config.megatron import check_with_megatron, moe_layers
from megatron_dynmix.config.run_config import HUB, require
from megatron_dynmix.convert.import_hf import check_load_hf
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.sources import check_prepared, pack_file, source_files
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.load import load_tokenizer
from megatron_dynmix.errors import InputError
from megatron_dynmix.plan.parameters import this_host, transformer_here
from megatron_dynmix.plan.plan import Plan, SourceWork
from megatron_dynmix.plan.proposals import nearest_world_sizes, propose
from megatron_dynmix.plan.text import needs_line, plan_text, size_text
from megatron_dynmix.training.mix import Mix, check_mix, initial_weights
from megatron_dynmix.training.mix_setup import Resolved
from megatron_dynmix.training.resume import check_pretrained

HOSTS = {
    "te": Host(cuda=True, transformer_engine=True, deep_ep=True, hybrid_ep=True),
    "cuda": Host(cuda=True, transformer_engine=False, deep_ep=True, hybrid_ep=True),
    "cpu": Host(cuda=False, transformer_engine=False),
}


def plan_run(
    arguments: argparse.Namespace,
    flags: list[str],
    world_size: int,
    *,
    as_json: bool,
    traced: bool = False,
) -> RunConfig:
    """Print the plan of a run on so many ranks; refuse one that cannot run, or fit, with layouts that can.

    Of the arguments `run_yaml`, `gpu_memory_gb` and `host` are read; `traced` adds what an iteration on fake
    GPUs shows. Returns the configuration.
    """
    gpu_memory_gb = arguments.gpu_memory_gb
    require(world_size >= 1, "--world-size", world_size, "1 or more")
    require(gpu_memory_gb is None or gpu_memory_gb > 0, "--gpu-memory-gb", gpu_memory_gb, "a positive number")
    config = load_config(arguments.run_yaml, flags)
    ranks = HOSTS[arguments.host or ("te" if config.training.bf16 else "cpu")]
    if gpu_memory_gb is not None and not ranks.cuda:
        raise InputError(
            f"--gpu-memory-gb is {gpu_memory_gb:g}, but the ranks are planned on CPUs (float32 without "
            "--host); leave it out, or give --bf16 or --host cuda"
        )
    gpu_gb = gpu_memory_gb or 80.0
    gpu_bytes = int(gpu_gb * 2**30) if ranks.cuda else None
    check = functools.partial(_check, ranks)

    def instead() -> str:
        """Return layouts that can run on these ranks; empty if none could, whatever the memory."""
        if found := propose(config, world_size, ranks, check, gpu_bytes):
            layouts = "".join(f"\n  {layout.describe()}" for layout in found)
            return f"\nwhat can run on {world_size} ranks:{layouts}"
        if propose(config, world_size, ranks, check, None):
            return f"\nno layout of {world_size} ranks fits into their memory; use more of them"
        return ""

    try:
        check(config, world_size)
    except InputError as error:
        near = nearest_world_sizes(config, world_size, check)
        layout = f"\nthis layout can run on {' or '.join(map(str, near))} ranks" if near else ""
        raise InputError(f"{error}{instead()}{layout}") from None
    plan = plan_of(config, world_size, ranks)
    needs = needs_line(plan.largest, ranks, gpu_bytes)
    traces = trace_stages(plan, arguments.run_yaml, flags, ranks) if traced else {}
    if as_json:
        shown = [{"stage": stage, **dataclasses.asdict(trace)} for stage, trace in traces.items()]
        print(json.dumps({**plan.as_json(), **({"trace": shown} if traced else {})}, indent=2))
    else:
        print("\n\n".join(filter(None, [plan_text(plan), trace_text(plan, traces), needs])))
    if gpu_bytes is not None and plan.largest.needed > gpu_bytes:
        raise InputError(
            f"pipeline stage {plan.largest.stage} needs about {size_text(plan.largest.needed)} on each GPU, "
            f"more than --gpu-memory-gb {gpu_gb:g}{instead()}"
        )
    return config


def _check(host: Host, config: RunConfig, world_size: int) -> None:
    """Refuse what `train` would on ranks of such hosts, before it looks at any file."""
    check_host(config, host)
    runnable = without_unmet(config, this_host())
    check_settings(runnable, world_size)
    check_idle(config)
    check_with_megatron(runnable)


def plan_of(config: RunConfig, world_size: int, host: Host) -> Plan:
    """Plan a run whose settings were checked, with what is known of its data on this machine."""
    notes: list[str] = []
    tokenizer, resolved = _tokenizer(config, notes), _check_mix(config, notes)
    _check_weights(config, notes)
    sources = _sources(config, tokenizer, resolved)
    return Plan(config=config, world_size=world_size, host=host, sources=sources, notes=tuple(notes))


def _tokenizer(config: RunConfig, notes: list[str]) -> Tokenizer | None:
    name = str(config.data.tokenizer)
    try:
        check_files(config)
    except InputError as error:
        notes.append(str(error))
    if name.startswith(HUB):
        notes.append(f"data.tokenizer is {name}, which is not fetched for a plan")
    if name.startswith(HUB) or not Path(name).exists():
        return None
    tokenizer = load_tokenizer(name, trust_remote_code=config.data.trust_remote_code)
    check_tokenizer(config, tokenizer.vocab_size)
    return tokenizer


def _check_mix(config: RunConfig, notes: list[str]) -> Resolved | None:
    """Check the strategy and return what its settings say; None if a file that it reads is not here."""
    mixing = config.mixing
    for name in ("reference", "target", "weights_from", "embeddings"):
        path = getattr(mixing, name)
        if path is not None and not Path(path).exists():
            notes.append(f"mixing.{name} is {path}, which does not exist on this machine")
            return None
    return check_mix(config, len(moe_layers(transformer_here(config))))


def _check_weights(config: RunConfig, notes: list[str]) -> None:
    """Check what the run starts from, if it is here."""
    load_hf, pretrained = config.model.load_hf, config.checkpoint.pretrained_checkpoint
    if load_hf is None or any(Path(load_hf).glob("*.safetensors")):
        check_load_hf(config)
    else:
        notes.append(f"model.load_hf is {load_hf}, whose weights are not on this machine")
    if pretrained is None or Path(pretrained).exists():
        check_pretrained(config)
    else:
        notes.append(f"checkpoint.pretrained_checkpoint is {pretrained}, which is not on this machine")


def _sources(
    config: RunConfig, tokenizer: Tokenizer | None, resolved: Resolved | None
) -> dict[str, SourceWork | str]:
    """Return what is known of each source, or why nothing is."""
    if tokenizer is None:
        return dict.fromkeys(config.data.sources, "the tokenizer is not on this machine")
    rows = {name: _rows(config, name, tokenizer) for name in config.data.sources}
    packed = [source for source in rows.values() if isinstance(source, PackedRows)]
    if len(packed) == len(rows) and resolved is not None:
        share_D = Mix.of(config, resolved, packed).first_D
    elif config.mixing.unit == "tokens":
        share_D = initial_weights(config)
    else:
        why = "weights of examples are shares of tokens only when all sources are prepared"
        return {name: why if isinstance(source, PackedRows) else source for name, source in rows.items()}
    return {
        name: source if isinstance(source, str) else SourceWork.of(source, share)
        for (name, source), share in zip(rows.items(), share_D.tolist(), strict=True)
    }


def _rows(config: RunConfig, name: str, tokenizer: Tokenizer) -> PackedRows | str:
    """Return the packed rows of a source that is prepared as the run wants it, or why it is not."""
    files = [file for file in source_files(config) if file.name == name]
    try:
        for file in files:
            check_prepared(config, file, tokenizer)
        return pack_file(config, files[0], tokenizer)
    except InputError as error:
        return str(error)
