"""Gate loads of a sample of each source, through a model as it is.

The settings become a RUN.yaml in the output folder, so that everything is checked, prepared and built as for
`train`. Axes: H halves, D sources, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_dynmix import platform
from megatron_dynmix.checkpoint.folder import verified
from megatron_dynmix.checkpoint.model_weights import fill_weights, load_weights
from megatron_dynmix.config import RunConfig
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import write_atomically
from megatron_dynmix.mixing.strategy import Counts
from megatron_dynmix.training.probe import Probe
from megatron_dynmix.training.run import build_runner, join_job
from megatron_dynmix.training.setup import CheckedRun, check_before_start, prepare_run
from megatron_dynmix.training.trainer import seed_iteration

SEQ_LENGTH = 1024
KEPT = ("model", "data", "training")
"""Sections of a run's configuration that say what its model is and how text becomes rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """What was seen of the sources."""

    half_counts_HDLE: Counts
    size_D: NDArray[np.int64]
    """Rows that each source has."""
    read_D: NDArray[np.int64]
    """Rows of it that were read."""
    tokens_D: list[int]
    losses: list[float | None]
    """Mean losses in nats of the trained tokens."""


class Spread(Sequence[Any]):
    """So many rows of a source, evenly spread over it."""

    def __init__(self, rows: PackedRows, count: int) -> None:
        self._rows = rows
        self._count = min(count, len(rows))

    def __len__(self) -> int:
        """Return the number of rows that are read."""
        return self._count

    def __getitem__(self, place: Any) -> Any:
        """Return a row as the source gives it."""
        return self._rows[place * len(self._rows) // self._count]


def source_paths(given: Sequence[str]) -> dict[str, str]:
    """Read `NAME=PATH` or `PATH`, whose file's name without endings is the source's.

    Raises:
        InputError: a name is given twice, or there is no such file or folder.

    """
    paths: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).name.split(".")[0], text
        if name in paths:
            raise InputError(
                f"two sources are called {name} ({paths[name]} and {path}); give names, as NAME=PATH"
            )
        if not Path(path).expanduser().exists():
            raise InputError(f"{path}: there is no such file or folder; give a source as PATH or NAME=PATH")
        paths[name] = str(Path(path).expanduser().resolve())
    return paths


def write_run_yaml(model: Path, sources: dict[str, str], output: Path, world_size: int) -> Path:
    """Write the RUN.yaml of a model, a run's or a Hugging Face one, and these sources; return its path.

    Raises:
        InputError: the folder is neither, or sources are missing.

    """
    run_yaml = model / "config.yaml"
    if run_yaml.is_file():
        whole = yaml.safe_load(run_yaml.read_text(encoding="utf-8"))
        content: dict[str, Any] = {section: whole.get(section, {}) for section in KEPT}
        content["model"].pop("load_hf", None)  # its weights are in the checkpoint
    elif (model / "config.json").is_file():
        content = {"model": {"load_hf": str(model.resolve())}, "data": {}, "training": {}}
        content["data"] = {"seq_length": SEQ_LENGTH, "overlong": "truncate"}
    else:
        raise InputError(
            f"{model} is no model: it holds neither config.json (a Hugging Face folder) nor config.yaml (a "
            "run directory); give one of these"
        )
    if sources:
        content["data"] |= {"sources": {name: {"path": path} for name, path in sources.items()}}
    names = list(content["data"].get("sources", {}))
    if len(names) < 2:
        raise InputError(
            f"similarity is between sources, and {'none is' if not names else f'only {names[0]} is'} given; "
            "give two or more, as NAME=PATH"
        )
    content["data"] |= {"prepared_dir": str((output / "prepared").resolve())}
    micro = content["training"].get("micro_batch_size", 1)
    content["training"] |= {"train_iters": 1, "global_batch_size": micro * world_size}
    for setting in ("rampup_batch_size", "step_batch_size_schedule"):
        content["training"].pop(setting, None)
    content["mixing"] = {"strategy": "uniqueness", "signal": "train", "interval": 1}
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "RUN.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return output / "RUN.yaml"


def set_up(config: RunConfig, model: Path) -> CheckedRun:
    """Refuse, as `InputError`, what can be refused before anything is read."""
    if not config.model.megatron.get("num_moe_experts"):
        raise InputError(
            f"{model} is a dense model, which has no router that could tell sources apart; give one with "
            "experts"
        )
    return check_before_start(config)


def measure(checked: CheckedRun, model: Path, tokens: int) -> Measurement:
    """Read so many positions of each source on this rank and its others; all get the same."""
    config = checked.config
    rows = prepare_run(checked).data.train
    join_job(config)
    here = platform.start()
    seed_iteration(config.training.seed, -1)  # building draws weights, which those of the model then replace
    run = build_runner(config, len(rows), here, trains=False)
    if config.model.load_hf is None:
        load_weights(run.chunks, verified(model / "checkpoints").source)
    else:
        from megatron_dynmix.convert.import_hf import load_hugging_face

        load_hugging_face(config, lambda tensors: fill_weights(run.chunks, tensors), lambda _: None)
    seq_length = config.data.seq_length
    some = [Spread(source, -(-tokens // seq_length)) for source in rows]
    probe = Probe(
        some,  # type: ignore[arg-type]  # rows by their numbers are all that it asks for
        run,
        probe_tokens=tokens,
        seq_length=seq_length,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pin_memory=here.pin_memory,
    )
    counts_HDLE, stats = probe.measure({}, 0)
    torch.distributed.barrier()
    return Measurement(
        half_counts_HDLE=run.counter.as_signal(counts_HDLE),
        size_D=np.array([len(source) for source in rows], np.int64),
        read_D=np.array([len(source) for source in some], np.int64),
        tokens_D=[int(count) for count in stats.tokens_D.tolist()],
        losses=list(stats.source_losses()),
    )
