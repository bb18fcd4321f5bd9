"""A plan as text for a terminal or a log."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dynmix.config.host import Host
from megatron_dynmix.plan.layout import group_text
from megatron_dynmix.plan.memory import FRAGMENTATION, OVERHEAD_BYTES, StageMemory, checkpoint_bytes
from megatron_dynmix.plan.parameters import model_parameters
from megatron_dynmix.plan.plan import Plan, SourceWork
from megatron_dynmix.records.text_table import foremost_rows, table

GIB = 2**30


def plan_text(plan: Plan) -> str:
    """Return everything, part by part."""
    ranks = "on CPU, over gloo"
    if plan.host.cuda:
        ranks = f"CUDA {'with' if plan.host.transformer_engine else 'without'} Transformer Engine"
    parts = [
        f"{model_line(plan)}\nlayout   {plan.layout.describe()}\nranks    {ranks}",
        _groups(plan),
        _steps(plan),
        memory_text(plan),
        _sources(plan),
        _mixing(plan),
        "\n".join(f"NOT CHECKED HERE: {note}" for note in plan.notes),
    ]
    return "\n\n".join(parts if plan.notes else parts[:-1])


def model_line(plan: Plan) -> str:
    """Return the parameters of the model, in all and for each token, and the size of a checkpoint."""
    total, active = model_parameters(plan.config), model_parameters(plan.config, active=True)
    size, model = checkpoint_bytes(plan.config, total), plan.config.model
    return (
        f"model    {model.preset or model.load_hf or 'as given'}: {count(total)} parameters, {count(active)} "
        f"active for a token; a checkpoint is {size_text(size)}"
    )


def memory_text(plan: Plan) -> str:
    """Return a line for each pipeline stage; the largest is marked."""
    header = ["stage", "layers", "parameters", "weights", "gradients", "optimizer", "activations", "total"]
    several = len(plan.memory) > 1
    rows = [
        [
            *(f"{stage.stage}{' (largest)' * (stage is plan.largest and several)}", stage.layers),
            *(count(stage.parameters.total), size_text(stage.weights), size_text(stage.gradients)),
            *(size_text(stage.optimizer), size_text(stage.activations.total), size_text(stage.total)),
        ]
        for stage in plan.memory
    ]
    return f"memory of a rank, by pipeline stage (docs/plan.md has the formulas):\n{table(header, rows)}"


def needs_line(stage: StageMemory, host: Host, gpu_bytes: int | None = None) -> str:
    """Say what the largest stage needs, and whether a GPU has it."""
    if not host.cuda:
        return f"a rank needs about {size_text(stage.total)} of main memory"
    margin = f"{FRAGMENTATION - 1:.0%} and {size_text(OVERHEAD_BYTES)} for what no formula has"
    line = f"a GPU needs about {size_text(stage.needed)}: {size_text(stage.total)}, and {margin}"
    if gpu_bytes is None:
        return line
    fits = "fits" if stage.needed <= gpu_bytes else "does not fit"
    return f"{line}; it {fits} into {size_text(gpu_bytes)}"


def _groups(plan: Plan) -> str:
    lines = [
        f"  {name:<10}{len(groups[0]):>6} ranks  {len(groups):>6} x  {group_text(groups)}"
        for name, groups in plan.layout.groups().items()
        if len(groups[0]) > 1
    ]
    if not lines:
        return "groups   every rank is alone"
    return "\n".join(["groups   (size, how many, the first ones)", *lines])


def _steps(plan: Plan) -> str:
    training, layout = plan.config.training, plan.layout
    lines = [
        f"step     {training.global_batch_size} rows = {layout.dp} replicas x "
        f"{layout.micro_batches(plan.config)} micro-batches x {training.micro_batch_size}; "
        f"{plan.tokens_per_iteration:,} tokens"
    ]
    if layout.pp > 1:
        lines.append(f"         pipeline stages wait {layout.bubble_share(plan.config):.1%} of it")
    tokens = plan.run_rows * plan.config.data.seq_length
    lines.append(f"run      {training.train_iters} iterations: {plan.run_rows:,} rows, {tokens:,} tokens")
    return "\n".join(lines)


def epochs_table(plan: Plan, sources: Sequence[SourceWork], most: int | None = None) -> str:
    """Return rows and tokens of an epoch of each source, and the epochs that the run draws of it.

    Of more than `most` sources, those with the largest shares.
    """
    header = ["source", "rows", "tokens an epoch", "useful", "start weight", "epochs in the run"]
    length = plan.config.data.seq_length
    rows = [
        [
            *(source.name, f"{source.rows:,}", f"{source.rows * length:,}", f"{source.useful_share:.1%}"),
            *(f"{source.share:.4f}", f"{plan.epochs(source):.2f}"),
        ]
        for source in sources
    ]
    return foremost_rows(header, rows, [source.share for source in sources], most)


def _sources(plan: Plan) -> str:
    known = [source for source in plan.sources.values() if isinstance(source, SourceWork)]
    lines = [epochs_table(plan, known)] if known else []
    lines += [
        f"{name}: rows and epochs unknown until prepared ({why})"
        for name, why in plan.sources.items()
        if isinstance(why, str)
    ]
    return "\n".join(lines)


def _mixing(plan: Plan) -> str:
    mixing, work = plan.config.mixing, plan.work
    lines = [f"mixing   {mixing.strategy}: {work.updates} updates, one each {mixing.interval} iterations"]
    if work.probe_tokens:
        lines.append(
            f"         a probe reads {work.probe_tokens:,} positions; all of them are "
            f"{work.mixing_compute_share:.2%} of the run's computing"
        )
    elif plan.config.mixing.measures:
        lines.append("         measured while training: no computing beside it")
    if work.count_bytes:
        lines.append(f"         counts to reduce for an update: {size_text(work.count_bytes)} a rank")
    return "\n".join(lines)


def count(number: int) -> str:
    """Return `46.70 B`, `1.31 M` or the number in full."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


def size_text(size: int) -> str:
    """Return bytes as GiB, MiB or KiB."""
    for unit, each in (("GiB", GIB), ("MiB", 2**20)):
        if size >= each:
            return f"{size / each:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"
