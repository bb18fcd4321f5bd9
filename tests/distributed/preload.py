"""Imported once by the fork server, so that a test's ranks start with everything loaded."""

import torch

from megatron_dynmix import platform

platform.start()
torch.set_num_threads(1)

import megatron_dynmix.training.run  # noqa: E402, F401
