"""What the data section alone can get wrong: files that are not there, weights that cannot be drawn by."""

from __future__ import annotations

import glob
from pathlib import Path

from megatron_dynmix.config.tree import HUB, RunConfig
from megatron_dynmix.errors import InputError


def check_data(config: RunConfig) -> None:
    """Refuse data settings that cannot work; `prepare` needs no more than these."""
    check_files(config)
    check_sources(config)


def check_files(config: RunConfig) -> None:
    """Refuse a tokenizer or a source that is not here, or that is not named at all."""
    data = config.data
    _check_named(config)
    assert data.tokenizer is not None, "checked above"
    if not data.tokenizer.startswith(HUB) and not Path(data.tokenizer).exists():
        raise InputError(
            f"data.tokenizer is {data.tokenizer}, which does not exist; give a folder, a .model or .tiktoken "
            f"file, or {HUB}ORGANISATION/NAME"
        )
    for name, source in data.sources.items():
        for key, path in (("path", source.path), ("probe", source.probe)):
            if path is not None and not Path(f"{path}.idx").is_file() and not _exists(path):
                raise InputError(
                    f"source {name}: {key} is {path}, but there is no such file, folder or pattern, and no "
                    f"prepared {path}.idx"
                )


def check_sources(config: RunConfig) -> None:
    """Refuse sources that cannot be drawn from, whatever their files hold."""
    data = config.data
    _check_named(config)
    weights = [source.weight for source in data.sources.values()]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        without = [name for name, source in data.sources.items() if source.weight is None]
        raise InputError(f"some sources have a weight, but not {', '.join(without)}; give all or none")
    if given and sum(given) <= 0:
        raise InputError("all sources have weight 0; at least one must be drawn from")


def _check_named(config: RunConfig) -> None:
    if not config.data.sources:
        raise InputError("data.sources is missing; name at least one: {chat: {path: chat.jsonl}}")
    if config.data.tokenizer is None:
        raise InputError("data.tokenizer is missing; give the folder of a Hugging Face tokenizer")


def _exists(path: str) -> bool:
    return Path(path).exists() or bool(glob.glob(path, recursive=True))
