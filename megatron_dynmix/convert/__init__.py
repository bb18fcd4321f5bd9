"""Weights between the tensors of a Hugging Face folder and those of a Megatron checkpoint."""
