"""The writer of a run's records, told what the run is: settings, versions, sources."""

from __future__ import annotations

import platform as machine
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dynmix import __version__
from megatron_dynmix.checkpoint.checkpoint import write_atomically
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import to_dict, to_yaml
from megatron_dynmix.records.metrics import MetricsWriter
from megatron_dynmix.training.start_report import packed_table, prepared_table

if TYPE_CHECKING:
    from megatron_dynmix.training.run import Data

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy", "transformers")


def open_writer(
    config: RunConfig, run_dir: Path, data: Data, *, resume_iteration: int | None
) -> MetricsWriter:
    """The writer of a run, on one rank; `config.yaml` is written and the dashboards know what runs."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", to_yaml(config))
    writer = MetricsWriter(
        run_dir,
        tuple(config.data.sources),
        resume_iteration=resume_iteration,
        wandb_project=config.logging.wandb_project,
        wandb_exp_name=config.logging.wandb_exp_name,
    )
    writer.text("config", f"```yaml\n{to_yaml(config)}```")
    writer.text("versions", "\n".join(f"- {name} {version}" for name, version in versions().items()))
    tables = [prepared_table(data.reports), packed_table([*data.train, *data.probe])]
    writer.text("sources", "\n\n".join(f"```\n{table}\n```" for table in tables))
    writer.settings(flat_settings(to_dict(config)))
    return writer


def versions() -> dict[str, str]:
    """What the run is made of, as far as it is installed."""
    found = {"megatron-dynmix": __version__, "python": machine.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def flat_settings(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | int | float | str]:
    """Settings under `section.name`, and those of sources under `data.sources.NAME.name`; lists as text."""
    flat: dict[str, bool | int | float | str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                add(f"{prefix}.{name}" if prefix else name, item)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            flat[prefix] = ", ".join(map(str, value))
        elif value is not None:
            flat[prefix] = value

    add("", sections)
    return flat
