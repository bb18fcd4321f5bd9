"""The same numbers under the same names for Weights & Biases; the extra `wandb`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dynmix.errors import InputError
from megatron_dynmix.records.heatmap import distance_image, gate_load_image
from megatron_dynmix.records.scalars import mixing_scalars, training_scalars


class WeightsAndBiasesWriter:
    """One run on Weights & Biases; a resumed run goes on with it.

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

    def training(self, record: Mapping[str, Any], sources: Sequence[str]) -> None:
        """Write one training record (see `MetricsWriter.training`)."""
        self._log(record["iteration"], training_scalars(record, sources))

    def mixing(self, update: Mapping[str, Any]) -> None:
        """Write one weight update (see `MetricsWriter.mixing`)."""
        images = {}
        if update["load"] is not None:
            images["dynmix/gate-load"] = gate_load_image(update["load"], update["sources"])
        if update["distance"] is not None:
            images["dynmix/distance"] = distance_image(update["distance"], update["sources"])
        drawn = {tag: self._wandb.Image(image) for tag, image in images.items()}
        self._log(update["iteration"], {**mixing_scalars(update), **drawn})

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
