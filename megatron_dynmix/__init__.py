"""Megatron-DynMix: dynamic data mixing for Mixture-of-Experts fine-tuning, built into Megatron-Core."""

__version__ = "0.1.0"
