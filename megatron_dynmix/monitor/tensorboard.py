"""TensorBoard events under Megatron-LM's own tags, and ours beside them under `dynmix/`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter

from megatron_dynmix.monitor.heatmap import distance_image, gate_load_image


class TensorBoardWriter:
    """Scalars, images and text of one run.

    `purge_step` is the first iteration that a resumed run writes again: events from there on are hidden.
    Scalars over consumed samples are hidden with them, since TensorBoard compares their step with
    `purge_step` too; write them again with `samples`.
    """

    def __init__(self, log_dir: Path, *, purge_step: int | None = None):
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step)

    def training(self, record: Mapping[str, Any], sources: Sequence[str]) -> None:
        """Write one training record (see `MetricsWriter.training`); a source without a loss gets no point."""
        iteration = record["iteration"]
        scalars = {
            **_megatron_scalars(record),
            "iteration-time": record["seconds"],
            "tokens-per-second": record["tokens_per_second"],
            "useful-token-share": record["useful_token_share"],
            "skipped-iterations": record["skipped_iterations"],
        }
        self._scalars(scalars, iteration)
        losses = {f"dynmix/lm-loss/{name}": record["source_loss"][name] for name in sources}
        self._scalars({tag: loss for tag, loss in losses.items() if loss is not None}, iteration)
        self.samples(record)

    def samples(self, record: Mapping[str, Any]) -> None:
        """Write only the record's `... vs samples` scalars, whose step is the number of consumed samples."""
        scalars = {f"{tag} vs samples": value for tag, value in _megatron_scalars(record).items()}
        self._scalars(scalars, record["consumed_samples"])

    def mixing(self, update: Mapping[str, Any]) -> None:
        """Write one weight update (see `MetricsWriter.mixing`); what it holds as None gets no point."""
        iteration, sources = update["iteration"], update["sources"]
        tokens_D = np.asarray(update["tokens"], dtype=np.float64)
        per_source = {
            "weight": update["new_weights"],
            "delta": update["delta"],
            "token-share": tokens_D / tokens_D.sum() if tokens_D.any() else None,
            "epochs": update["epochs"],
            "probe-lm-loss": update["probe_loss"],
            "delta-error": update["delta_error"],
            "example-weight": update.get("example_weights"),
            **{f"shadow/{label}": weights for label, weights in update["shadow"].items()},
        }
        for name, values_D in per_source.items():
            if values_D is not None:
                tagged = zip(sources, values_D, strict=True)
                self._scalars({f"dynmix/{name}/{source}": value for source, value in tagged}, iteration)
        self._scalars({"dynmix/entropy": update["entropy"], "dynmix/kl-step": update["kl_step"]}, iteration)
        self._scalars(
            {f"dynmix/seconds/{part}": value for part, value in update["seconds"].items()}, iteration
        )
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

    def flush(self) -> None:
        """Write out what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Write out what is buffered and close the file."""
        self._writer.close()

    def _scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for tag, value in scalars.items():
            # float() also reads the "NaN" of a record that comes back from a JSONL file
            self._writer.add_scalar(tag, float(value), step)

    def _image(self, tag: str, image_HWC: npt.NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(tag, image_HWC, step, dataformats="HWC")


def _megatron_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The scalars that Megatron-LM writes both over iterations and over consumed samples."""
    return {
        "lm loss": record["lm_loss"],
        **record["aux_losses"],
        "learning-rate": record["lr"],
        "batch-size": record["global_batch_size"],
        "grad-norm": record["grad_norm"],
    }
