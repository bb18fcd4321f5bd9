"""What of a run needs neither a process group nor a model: checked, read and made once.

`train` trains from it; `compare` asks it of every variant before a cell is started.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.batch_schedule import Pairs
from megatron_dynmix.config.check.data import check_tokenizer
from megatron_dynmix.config.host import check_host
from megatron_dynmix.config.megatron import check_with_megatron
from megatron_dynmix.config.megatron_fields import model_settings, moe_layers
from megatron_dynmix.data.sources import Data, read_data
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.load import load_tokenizer
from megatron_dynmix.plan.parameters import this_host
from megatron_dynmix.platform import packages
from megatron_dynmix.training.holding import lease_of
from megatron_dynmix.training.mix import Mix, check_mix
from megatron_dynmix.training.mix_setup import Resolved
from megatron_dynmix.training.resume import (
    Resume,
    batches_done,
    begins,
    check_pretrained,
    check_resume,
    check_run_dir,
)


@dataclass(frozen=True)
class CheckedRun:
    """A configuration that can run on this host, and what the checks have read."""

    config: RunConfig
    tokenizer: Tokenizer
    resolved: Resolved


@dataclass(frozen=True)
class PreparedRun:
    """What a run trains on, and what decides its weights."""

    config: RunConfig
    data: Data
    mix: Mix

    def after(self, done: Pairs) -> PreparedRun:
        """Return the run as it goes on after these batches."""
        horizon = self.mix.horizon
        horizon = replace(horizon, schedule=replace(horizon.schedule, done=done))
        return replace(self, mix=replace(self.mix, horizon=horizon))


def check_before_start(config: RunConfig, *, fresh: bool = True) -> CheckedRun:
    """Refuse, as `InputError`, what `check_run` has passed and can be refused without looking at any data.

    What a run began with need not be there any more when it is resumed, and so is not `fresh`.
    """
    wandb = config.logging.wandb_project is not None and packages.is_usable("wandb")
    host = replace(
        this_host(),
        deep_ep=packages.is_usable("deep_ep"),
        hybrid_ep=packages.has_hybrid_ep(),
        fused_weight_gradient_mlp_cuda=packages.is_usable("fused_weight_gradient_mlp_cuda"),
        grouped_gemm=packages.is_usable("grouped_gemm"),
        wandb=wandb,
    )
    check_host(config, host)
    resolved = check_mix(config, len(moe_layers(model_settings(config))))
    check_with_megatron(config)
    tokenizer = load_tokenizer(config.data.tokenizer or "", trust_remote_code=config.data.trust_remote_code)
    check_tokenizer(config, tokenizer.vocab_size)
    if fresh:
        if config.model.load_hf is not None:
            from megatron_dynmix.convert.import_hf import check_load_hf

            check_load_hf(config)
        check_pretrained(config)
    return CheckedRun(config, tokenizer, resolved)


def prepare_run(checked: CheckedRun, data: Data | None = None, *, done: Pairs = ()) -> PreparedRun:
    """Prepare and pack the data, unless they are given, and make the mix; `InputError` if that cannot be.

    A run that is resumed has `done` so many batches.
    """
    data = data or read_data(checked.config, checked.tokenizer)
    return PreparedRun(checked.config, data, Mix.of(checked.config, checked.resolved, data.train, done))


def set_up(
    config: RunConfig, run_dir: Path, *, resume: Resume = "no", allow_source_change: bool = False
) -> PreparedRun:
    """Refuse, as `InputError`, all that `train` may before ranks wait for one another; prepare the run."""
    checked = check_before_start(config, fresh=begins(run_dir, resume))
    lease_of(run_dir).refuse_if_held()
    check_run_dir(run_dir, resume)
    if config.checkpoint.save_hf is not None:
        from megatron_dynmix.convert.export_hf import check_export

        check_export(config, run_dir)
    prepared = prepare_run(checked, done=batches_done(run_dir, resume))
    check_resume(config, prepared.data.reports, run_dir, resume, allow_source_change=allow_source_change)
    return prepared
