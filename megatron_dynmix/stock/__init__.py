"""Mixing inside stock Megatron-LM and its forks: two lines in their own pretraining script."""

from megatron_dynmix.stock.entry import mixed, with_flags

__all__ = ["mixed", "with_flags"]
