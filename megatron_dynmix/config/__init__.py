"""The configuration of a run: YAML and Megatron-named flags, from the same dataclasses."""

from megatron_dynmix.config.run_config import RunConfig, SourceConfig

__all__ = ["RunConfig", "SourceConfig"]
