"""What several settings must agree on, and files that must be there.

Checked before torch is imported; `megatron.check_with_megatron` asks Megatron-Core for the rest.
"""

from __future__ import annotations

from megatron_dynmix.config.attention_experts import check_attention_experts
from megatron_dynmix.config.check.data import check_data, check_sources
from megatron_dynmix.config.check.layout import check_layout, check_lengths
from megatron_dynmix.config.check.mixing import check_mixing
from megatron_dynmix.config.check.model import check_capacity, check_model, check_router
from megatron_dynmix.config.check.schedule import check_length, check_wsd
from megatron_dynmix.config.idle import check_idle
from megatron_dynmix.config.run_config import RunConfig


def check_run(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work on so many ranks: the first thing found, and what would work."""
    check_data(config)
    check_settings(config, world_size)
    check_idle(config)


def check_settings(config: RunConfig, world_size: int) -> None:
    """Check a run without a look at the disk: the files may be on another machine."""
    check_sources(config)
    check_length(config)
    check_layout(config, world_size)
    check_wsd(config)
    check_model(config)
    check_attention_experts(config)
    check_router(config)
    check_capacity(config)
    check_mixing(config)
    check_lengths(config)
