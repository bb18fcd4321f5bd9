"""Imported once by the fork server, so that a test's ranks start with everything loaded."""

import gc

import torch

from megatron_dynmix import platform

platform.start()
torch.set_num_threads(1)

import numpy.ma  # noqa: E402, F401
import PIL.Image  # noqa: E402
import pydantic.types  # noqa: E402, F401
import tensorboard.plugins.hparams.metadata  # noqa: E402, F401
from torch._dynamo.trace_rules import get_torch_obj_rule_map  # noqa: E402

import megatron_dynmix.data.prepare.prepare  # noqa: E402
import megatron_dynmix.training.run  # noqa: E402, F401

# what the first step, save and picture of a process would load
PIL.Image.preinit()
get_torch_obj_rule_map()

# the collector need not look through all that was imported: ranks collect whenever a checkpoint is written
gc.collect()
gc.freeze()
