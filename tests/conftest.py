"""Every test process starts as a rank does: the platform first, Megatron-Core after it."""

from megatron_dynmix import platform

platform.start()
