"""TensorBoard events under Megatron-LM's own tags, and ours beside them under `dynmix/`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_dynmix.records.heatmap import distance_image, gate_load_image
from megatron_dynmix.records.scalars import CHARTS, megatron_scalars, mixing_scalars, training_scalars


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

    def training(self, record: Mapping[str, Any], sources: Sequence[str]) -> None:
        """Write one training record (see `MetricsWriter.training`); a source without a loss gets no point."""
        self._scalars(training_scalars(record, sources), record["iteration"])
        self.samples(record)

    def samples(self, record: Mapping[str, Any]) -> None:
        """Write only the record's `... vs samples` scalars, whose step is the number of consumed samples."""
        scalars = {f"{tag} vs samples": value for tag, value in megatron_scalars(record).items()}
        self._scalars(scalars, record["consumed_samples"])

    def mixing(self, update: Mapping[str, Any]) -> None:
        """Write one weight update (see `MetricsWriter.mixing`); what it holds as None gets no point."""
        iteration, sources = update["iteration"], update["sources"]
        self._scalars(mixing_scalars(update), iteration)
        if update["load"] is not None:
            self._image("dynmix/gate-load", gate_load_image(update["load"], sources), iteration)
        if update["distance"] is not None:
            self._image("dynmix/distance", distance_image(update["distance"], sources), iteration)
        if update["note"] is not None:
            self._writer.add_text("dynmix/note", update["note"], iteration)
        if update["events"]:
            self._writer.add_text(
                "dynmix/events", "\n".join(f"- {line}" for line in update["events"]), iteration
            )

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

    def _image(self, tag: str, image_HWC: npt.NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(tag, image_HWC, step, dataformats="HWC")
