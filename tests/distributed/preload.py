"""Imported once by the fork server, so that a test's ranks start with everything loaded."""

import os

# Asking the driver for devices would forbid CUDA in the processes forked from here; NVML may be asked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

from megatron_dynmix import platform

platform.start()
torch.set_num_threads(1)

import megatron_dynmix.training.run  # noqa: E402, F401
