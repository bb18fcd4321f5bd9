"""Sources, files and the tokenizer: what data settings must have before anything is prepared."""

from __future__ import annotations

import glob
from pathlib import Path

from megatron_dynmix.config.run_config import HUB, RunConfig
from megatron_dynmix.errors import InputError


def check_data(config: RunConfig) -> None:
    """Refuse data settings that cannot work; `prepare` needs no more than these."""
    check_sources(config)
    check_files(config)


def check_sources(config: RunConfig) -> None:
    """Refuse sources that are not named or cannot be drawn from, whatever their files hold."""
    data = config.data
    if not data.sources:
        raise InputError("data.sources is missing; name at least one: {chat: {path: chat.jsonl}}")
    if data.tokenizer is None:
        raise InputError("data.tokenizer is missing; give the folder of a Hugging Face tokenizer")
    without = [name for name, source in data.sources.items() if source.weight is None]
    if 0 < len(without) < len(data.sources):
        raise InputError(f"some sources have a weight, but not {', '.join(without)}; give all or none")
    if not without and not any(source.weight for source in data.sources.values()):
        raise InputError("all sources have weight 0; at least one must be drawn from")


def check_files(config: RunConfig) -> None:
    """Refuse a tokenizer or a source that is not here."""
    tokenizer = str(config.data.tokenizer)
    if not tokenizer.startswith(HUB) and not Path(tokenizer).exists():
        raise InputError(
            f"data.tokenizer is {tokenizer}, which does not exist; give a folder, a .model or .tiktoken "
            f"file, or {HUB}ORGANISATION/NAME"
        )
    for name, source in config.data.sources.items():
        for key, path in (("path", source.path), ("probe", source.probe)):
            if path is None or Path(f"{path}.idx").is_file() or Path(path).exists():
                continue
            if not glob.glob(path, recursive=True):
                raise InputError(
                    f"source {name}: {key} is {path}, but there is no such file, folder or pattern, and no "
                    f"prepared {path}.idx"
                )


def check_tokenizer(config: RunConfig, tokenizer_size: int) -> None:
    """Refuse a tokenizer with more tokens, added ones included, than the embedding has rows."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None, "the preset gives one"
    if tokenizer_size > vocab_size:
        raise InputError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer_size} tokens, but model.vocab_size is "
            f"{vocab_size}: its ids would have no embedding; set vocab_size to {tokenizer_size} or more"
        )
