"""A run's records on TensorBoard and on Weights & Biases: the same numbers under the same names.

The names are Megatron-LM's own tags, and ours beside them under `dynmix/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_dynmix.errors import InputError
from megatron_dynmix.records.heatmap import distance_image, gate_load_image
from megatron_dynmix.records.schema import MixingUpdate, TrainingRecord

CHARTS = {
    "weights": r"dynmix/weight/.*",
    "loss of each source": r"dynmix/lm-loss/.*",
    "delta of each source": r"dynmix/delta/.*",
    "share of the tokens so far": r"dynmix/token-share/.*",
    "epochs of each source": r"dynmix/epochs/.*",
    "busiest expert over the mean, by layer": r"dynmix/expert-load/.*",
    "CV squared of the experts' loads, by layer": r"dynmix/load-cv-squared/.*",
    "specialization of the experts, by layer": r"dynmix/specialization/.*",
}
"""Charts that show several tags at once: title -> regular expression of the tags."""


def training_scalars(record: TrainingRecord) -> dict[str, float]:
    """Return the scalars of one training record; a source without a loss has none."""
    losses = {f"dynmix/lm-loss/{name}": loss for name, loss in record.source_loss.items()}
    return {
        **megatron_scalars(record),
        "iteration-time": record.seconds,
        "tokens-per-second": record.tokens_per_second,
        "useful-token-share": record.useful_token_share,
        "skipped-iterations": record.skipped_iterations,
        **_known(losses),
    }


def megatron_scalars(record: TrainingRecord) -> dict[str, float]:
    """Return the scalars that Megatron-LM writes both over iterations and over consumed samples."""
    return {
        "lm loss": record.lm_loss,
        **record.aux_losses,
        "learning-rate": record.lr,
        "batch-size": record.global_batch_size,
        "grad-norm": record.grad_norm,
    }


def mixing_scalars(update: MixingUpdate) -> dict[str, float]:
    """Return the scalars of one weight update; what it holds as None has none."""
    total = sum(update.tokens)
    per_source: dict[str, Sequence[float | None] | None] = {
        "weight": update.new_weights,
        "delta": update.delta,
        "token-share": [tokens / total for tokens in update.tokens] if total else None,
        "epochs": update.epochs,
        "probe-lm-loss": update.probe_loss,
        "delta-error": update.delta_error,
        "example-weight": update.example_weights,
        **{f"shadow/{label}": weights for label, weights in update.shadow.items()},
    }
    scalars = {
        f"dynmix/{name}/{source}": value
        for name, values_D in per_source.items()
        if values_D is not None
        for source, value in zip(update.sources, values_D, strict=True)
    }
    use = update.expert_use
    per_layer = (
        {}
        if use is None
        else {
            "expert-load": use.busiest,
            "load-cv-squared": use.cv_squared,
            "specialization": use.specialization or [],
        }
    )
    return {
        **_known(scalars),
        "dynmix/entropy": update.entropy,
        "dynmix/kl-step": update.kl_step,
        **{f"dynmix/seconds/{part}": value for part, value in update.seconds.items()},
        **{
            f"dynmix/{name}/layer-{layer}": value
            for name, values_L in per_layer.items()
            for layer, value in enumerate(values_L)
        },
    }


def mixing_images(update: MixingUpdate) -> dict[str, NDArray[np.uint8]]:
    """Return the heat maps of one weight update, `[H, W, 3]`; what it holds as None has none."""
    images = {}
    if update.load is not None:
        images["dynmix/gate-load"] = gate_load_image(update.load, update.sources)
    if update.distance is not None:
        images["dynmix/distance"] = distance_image(update.distance, update.sources)
    return images


def _known(scalars: Mapping[str, float | None]) -> dict[str, float]:
    return {tag: value for tag, value in scalars.items() if value is not None}


class TensorBoardWriter:
    """Scalars, images and text of one run.

    `purge_step` is the first iteration that a resumed run writes again: events from there on are hidden.
    Scalars over consumed samples are hidden with them, since TensorBoard compares their step with
    `purge_step` too; write them again with `samples`.
    """

    def __init__(self, log_dir: Path, *, purge_step: int | None = None):
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step)
        self._writer.add_custom_scalars(
            {"dynmix": {title: ["Multiline", [tags]] for title, tags in CHARTS.items()}}
        )

    def training(self, record: TrainingRecord) -> None:
        """Write one training record; a source without a loss gets no point."""
        self._scalars(training_scalars(record), record.iteration)
        self.samples(record)

    def samples(self, record: TrainingRecord) -> None:
        """Write only the record's `... vs samples` scalars, whose step is the number of consumed samples."""
        scalars = {f"{tag} vs samples": value for tag, value in megatron_scalars(record).items()}
        self._scalars(scalars, record.consumed_samples)

    def mixing(self, update: MixingUpdate) -> None:
        """Write one weight update; what it holds as None gets no point."""
        self._scalars(mixing_scalars(update), update.iteration)
        for tag, image_HWC in mixing_images(update).items():
            self._writer.add_image(tag, image_HWC, update.iteration, dataformats="HWC")
        if update.notes:
            text = "; ".join(note.text for note in update.notes)
            self._writer.add_text("dynmix/note", text, update.iteration)
        if update.events:
            text = "\n".join(f"- {event.text}" for event in update.events)
            self._writer.add_text("dynmix/events", text, update.iteration)

    def text(self, tag: str, markdown: str) -> None:
        """Write a text that belongs to the whole run, such as the resolved configuration."""
        self._writer.add_text(tag, markdown, 0)

    def settings(self, settings: Mapping[str, bool | int | float | str]) -> None:
        """Tell the settings of the run, to be compared with other runs' beside the loss."""
        for summary in hparams(dict(settings), {"lm loss": 0.0}):
            self._writer._get_file_writer().add_summary(summary)

    def flush(self) -> None:
        """Write out what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Write out what is buffered and close the file."""
        self._writer.close()

    def _scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)


class WeightsAndBiasesWriter:
    """One run on Weights & Biases; a resumed run continues it.

    Points are placed by the metric `iteration`. What the service has already cannot be taken back, so
    iterations that a resumed run trains again, which bring the same numbers, are not sent twice.
    """

    def __init__(self, run_dir: Path, *, project: str, name: str | None, resumes: bool):
        import wandb

        self._wandb = wandb
        identity = run_dir / "wandb_run_id"
        known = identity.read_text().strip() if resumes and identity.is_file() else None
        try:
            self._run = wandb.init(
                project=project, name=name or run_dir.name, dir=str(run_dir), id=known, resume="allow"
            )
        except Exception as error:  # the service and its client have many ways to fail
            raise InputError(
                f"Weights & Biases cannot be reached for project {project}: {error}; log in with `wandb "
                "login`, set WANDB_MODE=offline, or leave out --wandb-project"
            ) from error
        identity.write_text(self._run.id)
        self._sent = int(self._run.summary.get("iteration", -1)) if known else -1
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def training(self, record: TrainingRecord) -> None:
        """Write one training record."""
        self._log(record.iteration, training_scalars(record))

    def mixing(self, update: MixingUpdate) -> None:
        """Write one weight update."""
        drawn = {tag: self._wandb.Image(image_HWC) for tag, image_HWC in mixing_images(update).items()}
        self._log(update.iteration, {**mixing_scalars(update), **drawn})

    def text(self, tag: str, markdown: str) -> None:
        """Keep a text that belongs to the whole run."""
        self._run.summary[tag] = markdown

    def settings(self, settings: Mapping[str, bool | int | float | str]) -> None:
        """Tell the settings of the run."""
        self._run.config.update(dict(settings), allow_val_change=True)

    def _log(self, iteration: int, values: Mapping[str, Any]) -> None:
        if iteration > self._sent:
            self._run.log({"iteration": iteration, **values})

    def flush(self) -> None:
        """Nothing to do: what is logged is sent by a process of the client's own."""

    def close(self) -> None:
        """End the run on the service."""
        self._run.finish()
