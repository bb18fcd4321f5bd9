"""Whether a run may resume from what its directory holds. Everything here reads JSON only."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron_dynmix.checkpoint.folder import exact, has_checkpoint, newest_good
from megatron_dynmix.checkpoint.run_state import Identity, RunState, read_run_state, read_saved
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.batch_schedule import BatchSchedule, Pairs
from megatron_dynmix.config.load import to_dict
from megatron_dynmix.config.megatron_fields import model_settings
from megatron_dynmix.config.presets import other_shape
from megatron_dynmix.config.run_config import MixingConfig, OptimizerConfig, TrainingConfig
from megatron_dynmix.data.prepared import SourceReport
from megatron_dynmix.data.source_set import differences
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.strategies import STRATEGIES
from megatron_dynmix.mixing.strategies.planned import Fixed
from megatron_dynmix.model.lr_schedule import learning_rate
from megatron_dynmix.moe.balance import balancing

Resume = Literal["no", "must", "auto"]
Settings = Mapping[str, Any]

ORDER, LOADS = "the order of the rows", "what gate loads are"
FIXED = {
    "training.seed": ORDER,
    "data.seq_length": ORDER,
    "data.overlong": ORDER,
    "data.packing": ORDER,
    "data.segment_multiple": ORDER,
    "mixing.unit": ORDER,
    "mixing.load_tokens": LOADS,
    "mixing.load_mass": LOADS,
    "mixing.load_routers": LOADS,
    "mixing.similarity_correction": "what the strategy remembers",
    "mixing.begin_with": "the weights that it began with",
}
"""Settings that the state of the mix depends on -> what they decide."""
FOLLOWED_BY_LR = (
    *("optimizer.lr", "optimizer.min_lr", "training.train_iters", "training.global_batch_size"),
    *("training.rampup_batch_size", "training.step_batch_size_schedule"),
)
"""How the settings begin that the learning rate follows from."""
BY_MICRO_BATCH = ("aux_loss", "global_aux_loss")
"""Balancing losses that are taken over all rows of a micro-batch at once."""


def identity(config: RunConfig, reports: Sequence[SourceReport]) -> Identity:
    """Return the identity of a run on sources that were prepared as reported: train first, then probes."""
    names = list(config.data.sources)
    return Identity(
        config=to_dict(config),
        fingerprints={
            name: [*(file.sha256 for file in report.inputs), *report.recipe.prints]
            for name, report in zip(names, reports, strict=False)
        },
        probes={
            name: [file.sha256 for file in report.inputs]
            for name, report in zip(config.data.probed, reports[len(names) :], strict=False)
        },
    )


def begins(run_dir: Path, resume: Resume) -> bool:
    """Whether a run begins, rather than resuming from a checkpoint."""
    return resume == "no" or not has_checkpoint(run_dir / "checkpoints")


def batches_done(run_dir: Path, resume: Resume) -> Pairs:
    """Return the batches that are behind a run, as far as its files' sizes tell."""
    if begins(run_dir, resume):
        return ()
    return read_run_state(newest_good(run_dir / "checkpoints").source).progress.batches


def check_run_dir(run_dir: Path, resume: Resume) -> None:
    """Refuse a run directory that does not go with `resume`, or cannot be written."""
    checkpoints = run_dir / "checkpoints"
    if resume == "must" and begins(run_dir, resume):
        raise InputError(
            f"--resume must, but {checkpoints} holds no checkpoint; check the path, or start a new run with "
            "--resume auto"
        )
    if resume == "no" and (has_checkpoint(checkpoints) or (run_dir / "metrics.jsonl").is_file()):
        raise InputError(f"{run_dir} holds a run already; give another --run-dir, or --resume auto")
    for folder in (run_dir, checkpoints):  # which may be a link to another disk
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}); give another --run-dir"
            ) from None


def check_resume(
    config: RunConfig,
    reports: Sequence[SourceReport],
    run_dir: Path,
    resume: Resume,
    *,
    allow_source_change: bool = False,
    source: Path | None = None,
) -> list[str]:
    """Refuse to resume with another model, other data or another order; list every other change.

    What the run would resume from is `source`, or else the newest good checkpoint, as far as its files'
    sizes tell. Nothing is compared where it resumes from none. Settings that differ, listed as
    `section.name: old -> new`, are in force from now on; weights are not among them: the mix continues.
    """
    if begins(run_dir, resume):
        return []
    source = source or newest_good(run_dir / "checkpoints").source
    saved, now = read_run_state(source), identity(config, reports)
    _check_shape(saved.config["model"], now.config["model"], source)
    other_sources = differences(saved.fingerprints, now.fingerprints)
    if other_sources and not allow_source_change:
        raise InputError(
            f"the sources are not those that {source} was trained on: {'; '.join(other_sources)}. Resume "
            "with what they were; or with what they are now: --allow-source-change; or start a new --run-dir "
            f"with --pretrained-checkpoint {run_dir / 'checkpoints'}"
        )
    changed: dict[str, tuple[Any, Any]] = {
        f"{section}.{name}": (settings.get(name), new.get(name))
        for section, new in now.config.items()
        # a setting that the run did not know yet had its default
        for settings in [{**_own_defaults(section), **saved.config.get(section, {})}]
        for name in {**saved.config.get(section, {}), **new}
        if settings.get(name) != new.get(name)
    }
    for name, decided in FIXED.items():
        if name in changed:
            was, given = changed[name]
            raise InputError(
                f"{name} was {was} when {source} was written and is {given} now, which changes {decided}; "
                f"resume with {was}"
            )
    _check_strategy(saved.config["mixing"], config.mixing, source)
    before, after = changed.pop("data.sources", ({}, {}))  # paths may differ
    if before.keys() == after.keys() and _each(before, "weight") != _each(after, "weight"):
        raise InputError(
            "the initial weights of the sources changed, but a resumed run keeps the weights it had; give "
            "the old ones, or start a new --run-dir"
        )
    for name, cap in _each(after, "max_epochs").items():
        if name in before and before[name].get("max_epochs") != cap:
            changed[f"data.sources.{name}.max_epochs"] = (before[name].get("max_epochs"), cap)
    other_probes = [
        f"{name}: held-out rows of other content"
        for name, probe in now.probes.items()
        if saved.probes.get(name, probe) != probe
    ]
    settings = [f"{name}: {old} -> {new}" for name, (old, new) in changed.items()]
    if "training.micro_batch_size" in changed and (why := _by_micro_batch(config)):
        settings.append(f"with another micro_batch_size, {why}: the weights will differ a little")
    if any(name.startswith(FOLLOWED_BY_LR) for name in changed):
        settings.append(_lr_change(saved, config))
    return [*other_sources, *other_probes, *settings]


def _own_defaults(section: str) -> Settings:
    """Return the defaults of a section's settings, of those that are ours."""
    return vars(getattr(RunConfig(), section))


def _by_micro_batch(config: RunConfig) -> str | None:
    """Return what of a step is decided within each micro-batch; None if nothing is."""
    model = model_settings(config)
    if not model.num_moe_experts:
        return None
    if any(kind == "sinkhorn" or (kind in BY_MICRO_BATCH and number) for kind, number in balancing(model)):
        return "the experts are balanced over other tokens (those of a micro-batch)"
    if model.moe_expert_capacity_factor is not None:
        return "other tokens are dropped (those beyond the capacity, by micro-batch)"
    return None


def _lr_change(saved: RunState, config: RunConfig) -> str:
    """Return the learning rate at the checkpoint by the settings of then and of now, and that of the end."""
    progress, total = saved.progress, config.training.train_iters
    assert total is not None, "checked before start"
    then = replace(
        config,
        training=TrainingConfig.from_flat(saved.config["training"]),
        optimizer=OptimizerConfig.from_flat(saved.config["optimizer"]),
    )

    def rate(settings: RunConfig, iteration: int) -> str:
        batches = replace(BatchSchedule.of(settings), done=progress.batches)
        return f"{learning_rate(settings, batches, batches.samples_at(iteration)):.6E}"

    before, after = rate(then, progress.iteration), rate(config, progress.iteration)
    return (
        f"learning rate after iteration {progress.iteration}: {before} -> {after}; after iteration {total}: "
        f"{rate(config, total)}"
    )


def _each(sources: Settings, setting: str) -> dict[str, Any]:
    """Return one setting of every source."""
    return {name: settings.get(setting) for name, settings in sources.items()}


def _check_strategy(saved: Settings, mixing: MixingConfig, source: Path) -> None:
    """Refuse another strategy or other options that only have a say at the start of a run."""
    kind: Any = STRATEGIES.get(mixing.strategy)
    if kind is None or kind.updates or kind is Fixed:
        return
    before = saved["strategy"]
    if before != mixing.strategy:
        raise InputError(
            f"mixing.strategy was {before} when {source} was written; {mixing.strategy} chooses weights at "
            f"the start of a run only: resume with {before}, keep the weights with fixed, or start a new "
            "--run-dir"
        )
    for name, value in {**mixing.options, "sizes": mixing.sizes}.items():
        if saved.get(name, value) != value:
            raise InputError(
                f"mixing.{name} was {saved[name]} when {source} was written and is {value} now, but {before} "
                f"chooses weights at the start of a run only: resume with {saved[name]}, or start a new "
                "--run-dir"
            )


def check_pretrained(config: RunConfig) -> None:
    """Refuse weights of another model, or none."""
    if config.checkpoint.pretrained_checkpoint is not None:
        source = exact(newest_good(Path(config.checkpoint.pretrained_checkpoint)))
        _check_shape(read_saved(source).config["model"], to_dict(config)["model"], source)


def _check_shape(saved: Settings, now: Settings, source: Path) -> None:
    if differing := other_shape(saved, now):
        changes = ", ".join(f"{name} {saved.get(name)} (now {now.get(name)})" for name in differing)
        raise InputError(f"{source} holds another model: {changes}; give the model it was trained with")
